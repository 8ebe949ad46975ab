"""Where tests run, decided before JAX or Triton is imported; hypothesis profiles.

- `pytest`: on the CPU, kernels in Triton's interpreter.
- `pytest -m compile`: on the CPU without the interpreter, which kernels need to be compiled for real GPUs.
- `JAX_BRIDGE_TEST_DEVICE=gpu pytest -m gpu`: on the local GPU, natively.
"""

from __future__ import annotations

import itertools
import os
import re
import tempfile
import zlib
from collections.abc import Iterator

import hypothesis
import pytest

hypothesis.settings.register_profile(
    "ci",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=10,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.register_profile("full", hypothesis.settings.get_profile("ci"), derandomize=False, max_examples=300)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

VIRTUAL_DEVICES = "--xla_force_host_platform_device_count=8"


def _asks_for_compiling(config: pytest.Config) -> bool:
    expression: str = config.option.markexpr
    return "compile" in expression and "not compile" not in expression


def _runs_on_gpu() -> bool:
    return os.environ.get("JAX_BRIDGE_TEST_DEVICE") == "gpu"


@pytest.fixture(scope="module")
def small_device() -> Iterator[None]:
    """Kernels are launched for a small device, unless a GPU runs them: the interpreter takes its time a program."""
    from jax_bridge.device import target_device
    from tests.implementations import ON_GPU, SMALL_DEVICE

    if ON_GPU:
        yield
    else:
        with target_device(SMALL_DEVICE):
            yield


def pytest_configure(config: pytest.Config) -> None:
    """Sets the environment. Test modules, and with them JAX and Triton, are imported later."""
    for name in ("JAX_BRIDGE_AUTOTUNE", "JAX_BRIDGE_TARGET"):
        os.environ.pop(name, None)
    configurations = tempfile.TemporaryDirectory()  # what the user has tuned stays outside
    config.add_cleanup(configurations.cleanup)
    os.environ["JAX_BRIDGE_CACHE_DIR"] = configurations.name
    if not _runs_on_gpu():
        os.environ["JAX_PLATFORMS"] = "cpu"
        flags = os.environ.get("XLA_FLAGS", "")
        if "xla_force_host_platform_device_count" not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} {VIRTUAL_DEVICES}".strip()
        if _asks_for_compiling(config):
            os.environ.pop("TRITON_INTERPRET", None)
        else:
            os.environ["TRITON_INTERPRET"] = "1"
            # The interpreter takes maxima by numpy.nanmax, which warns where a neighbour's NaN fills a tile.
            config.addinivalue_line("filterwarnings", "ignore:All-NaN slice encountered:RuntimeWarning")


SAMPLED = {
    r"test_properties\.py.*ragged_decode_attention\[triton\]": 3,
    r"test_nvidia\[ragged": 2,
    r"test_packed_properties": 4,
    r"test_hopper_interpreted": 2,
    r"test_compile_hopper\.py::test_(prompts|features|bounded_logits)": 2,
    r"test_planted_bugs": 2,
    r"test_compile_tpu\.py::(?!test_variant_compiles)": 3,
    r"test_compile_attention": 2,
    r"test_packed_on_nvidia": 2,
    r"test_matches_float64\[(unified|prefill_page)_attention\[triton\]-.*-float32": 3,
    r"test_matches_float64\[attention\[triton\]-.*-float32": 2,
    r"test_matches_float64\[ragged_decode_attention\[triton\]-.*-float32": 2,
    r"test_matches_float64\[.*\[pallas\]-": 9,
    r"test_properties\.py.*\[pallas\]": 6,
    r"test_tpu_kernels\.py.*(caught|hints_change)": 6,
    r"test_default_blocks_fit_the_smallest_chip\[unified": 8,
    r"test_llama_compiles_as_xla_lays_its_arrays_out": 3,
    r"test_right_where_taken": 4,
    r"test_right_where_taken\[.*-pallas-": 8,
}
"""Tests of which a run without HYPOTHESIS_PROFILE=full takes one in so many, always the same ones.

Of every function it takes one at least.
"""


def _is_for_later(item: pytest.Item) -> bool:
    if _runs_on_gpu() or os.environ.get("HYPOTHESIS_PROFILE") == "full":
        return False
    share = max((number for pattern, number in SAMPLED.items() if re.search(pattern, item.nodeid)), default=1)
    return zlib.crc32(item.nodeid.encode()) % share > 0


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what this run cannot execute: native tests without a GPU, compilations in the interpreter."""
    unwanted = set()
    if not _runs_on_gpu():
        unwanted.add("gpu")
    if not _asks_for_compiling(config):
        unwanted.add("compile")
    wanted = [item for item in items if not any(item.get_closest_marker(name) for name in unwanted)]
    chosen: set[pytest.Item] = set()
    for _, group in itertools.groupby(wanted, lambda item: item.nodeid.partition("[")[0]):
        of_one_function = list(group)
        chosen.update([item for item in of_one_function if not _is_for_later(item)] or of_one_function[:1])
    if left_out := [item for item in items if item not in chosen]:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item in chosen]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says how many calls the TPU's compiler took."""
    passed = [report.nodeid for report in terminalreporter.stats.get("passed", ()) if report.when == "call"]
    if compiled := sum("test_compile_tpu" in name and "compiles" in name for name in passed):
        terminalreporter.write_line(f"{compiled} TPU variants compiled")
