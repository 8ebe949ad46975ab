"""Timing an operation's candidate configurations on the device at hand."""

import concurrent.futures
import contextvars
import dataclasses
import itertools
import logging
import math
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_bridge import launch, timing, tuned_configs
from jax_bridge.configs import Config
from jax_bridge.device import Device, current_device, is_at_hand
from jax_bridge.operation import INDEX_ARGUMENTS, Branch, Implementation, Invocation, Operation
from jax_bridge.registry import find_operation
from jax_bridge.sharding import invocation_of_a_call
from jax_bridge.tuned_configs import Choice

WARM_UP, ITERATIONS = 5, 100
_CALLS_PER_PROGRAM = 10
_LONG_SECONDS = 1e-3  # calls that last longer hide what launching costs
_MOST_OUTPUT_BYTES = 256 << 20  # of the calls of a program
_COLD_BYTES = 128 << 20  # arrays that calls take in turn, so that no L2 cache holds what the next call reads

_LOST_IN_NOISE = "its time is lost in noise: more calls took no longer than fewer"
_WRONG = "its result differs from that of the reference"

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Trial:
    """What came of one candidate: its seconds a call, or words for why it is left out."""

    cfg: Config
    seconds: float | None
    problem: str | None = None

    @property
    def is_right(self) -> bool:
        """Whether it runs and answers right, though perhaps too quickly to be timed."""
        return self.problem in (None, _LOST_IN_NOISE)


@dataclasses.dataclass(frozen=True)
class TuningReport:
    """What tuning one call found; `str()` of it is a table.

    Attributes:
        operation: the operation's name.
        platform: the platform that was tuned.
        device: what it was timed on.
        trials: an entry a candidate, in the order of `candidate_cfgs`.
        best: the fastest right configuration.
        path: the file that it was written to, or None.
    """

    operation: str
    platform: str
    device: str
    trials: tuple[Trial, ...]
    best: Config
    path: Path | None

    def __str__(self) -> str:
        timed = sorted((t for t in self.trials if t.seconds is not None), key=lambda trial: trial.seconds or 0.0)
        runs = f"{sum(trial.is_right for trial in self.trials)} of {len(self.trials)} candidates run"
        title = f"{self.operation}[{self.platform}] on {self.device}: {runs}"
        lines = [title, "  microseconds  configuration"]
        lines += [
            f"  {1e6 * (t.seconds or 0.0):12.2f}  {self._differing(t.cfg)}{' <- taken' if t.cfg == self.best else ''}"
            for t in timed
        ]
        lines += [f"      left out  {self._differing(t.cfg)}: {t.problem}" for t in self.trials if t.seconds is None]
        return "\n".join([*lines, f"  written to {self.path}" if self.path else "  kept for this process only"])

    def _differing(self, cfg: Config) -> str:
        """The fields in which any two candidates differ."""
        every = [_flat(trial.cfg) for trial in self.trials]
        fields = {name: value for name, value in _flat(cfg).items() if len({other[name] for other in every}) > 1}
        return ", ".join(f"{name}={value}" for name, value in fields.items()) or "the only one"


def _flat(cfg: Any) -> dict[str, Any]:
    fields = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(cfg)}
    inner = fields.pop("fwd_params", None)
    return fields | (_flat(inner) if inner is not None else {})


def tune(op: Any, *args: Any, platform: str | None = None, **kwargs: Any) -> Config:
    """Time the candidate configurations of a call on this device, and take the fastest right one from now on.

    Each candidate is compiled, compared with `platform="xla"`, and timed: 5 warm-up runs, then the median of 100, of a
    program of several calls. One that does not compile or answers wrongly is left out. The winner serves later calls
    with the same shapes, dtypes and options that name no `cfg`, and is written to the user's cache directory
    (`python -m jax_bridge.explain` says where), so that it serves later processes on such a GPU too. Programs that are
    compiled already stay as they are.

    Where no kernel runs, there is one candidate: `xla` has nothing to configure. Under Triton's interpreter, whose
    times mean nothing, a call is timed once. A table of results goes to the log (`jax_bridge.tuning`, level INFO).

    Args:
        op: an operation's name, public function or object.
        *args: positional arguments of the operation: arrays, or `jax.ShapeDtypeStruct`s for which contents are made up
            (full lengths, shuffled pages).
        platform: the platform to tune; None or `"auto"` for the kernel that runs here.
        **kwargs: keyword arguments of the operation, but not `cfg`; with a `mesh` one shard is tuned.

    Returns:
        The fastest configuration.

    Raises:
        TypeError: an argument of the wrong type or dtype, or a `cfg`.
        ValueError: shapes or values that do not fit, an unknown operation, no candidate that is right, or arrays for
            which `xla`, with which candidates are compared, has too little memory.
        NotImplementedError: the platform does not support what is asked for.

    Warns:
        RuntimeWarning: a candidate answers wrongly, or the result cannot be written.
    """
    return tuned(op, *args, platform=platform, **kwargs).best


def tuned(op: Any, *args: Any, platform: str | None = None, **kwargs: Any) -> TuningReport:
    """As `tune`, with the results of all candidates."""
    operation = find_operation(op)
    if "cfg" in kwargs:
        raise TypeError(f"tune: {operation.name} got cfg, expected none: tune chooses it")
    requested = operation.requested_platform(platform, None)
    invocation = invocation_of_a_call(operation, args, kwargs)
    row = _row_to_tune(operation, invocation, requested)
    device = current_device() if row.heuristic_cfg is not None else None
    if row.platform == "triton" and not launch.interpreting() and not is_at_hand(current_device()):
        target = current_device().name
        raise ValueError(f"tune: {operation.name}[triton] is compiled for {target}, expected the GPU of this machine")
    if any(isinstance(array, jax.core.Tracer) for array in invocation.arrays.values()):
        return _outside_of_traces(lambda: _measure(operation, row, _shapes_of(invocation), device))
    return _measure(operation, row, invocation, device)


_one_at_a_time = threading.Lock()


def autotuned(operation: Operation, row: Implementation, invocation: Invocation, device: Device) -> Choice | None:
    """What tuning on made-up arrays of the same shapes finds; None where there is nothing to tune or to tune on.

    May be called while tracing: everything runs outside of the trace. If tuning fails, that is said once, and the
    heuristics serve the call from then on.
    """
    if not _runs_here(row.platform, device) or len(operation.candidates_of(row, invocation)) < 2:
        return None
    with _one_at_a_time:
        choice = tuned_configs.find(invocation, row.platform, device)
        if choice is not None:
            return choice
        shapes = _shapes_of(invocation)
        try:
            _outside_of_traces(lambda: _measure(operation, row, shapes, device))
        except Exception as error:
            heuristics = operation.branches(invocation, row.platform, None, may_tune=False)[0]
            choice = Choice(heuristics.cfg, f"{heuristics.source}, as tuning failed")
            tuned_configs.remember(invocation, row.platform, device, choice)
            message = f"{tuned_configs.POLICY_VARIABLE}: {operation.name} is not tuned, heuristics serve it: {error}"
            warnings.warn(message, RuntimeWarning, stacklevel=1)
        return tuned_configs.find(invocation, row.platform, device)


def _runs_here(platform: str, device: Device) -> bool:
    if platform == "triton":
        return launch.interpreting() or (jax.default_backend() == "gpu" and is_at_hand(device))
    return jax.default_backend() == {"pallas": "tpu", "cuda": "gpu"}.get(platform, jax.default_backend())


def _row_to_tune(operation: Operation, invocation: Invocation, requested: str) -> Implementation:
    """The implementation on a named platform, or the kernel that runs here, or what `"auto"` takes."""
    if requested == "auto":
        row = operation.configurable(invocation)
        if row is not None and row.heuristic_cfg is not None and _runs_here(row.platform, current_device()):
            return row
    branches = operation.branches(invocation, requested, None, may_tune=False)
    here: list[Branch] = [b for b in branches if b.implementation.platform == _KERNELS_OF.get(jax.default_backend())]
    return (here or branches)[-1].implementation


_KERNELS_OF = {"gpu": "triton", "tpu": "pallas"}


def _outside_of_traces[T](function: Callable[[], T]) -> T:
    """Call `function` in a thread of its own: traces, meshes and default devices belong to the thread that set them."""
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        return executor.submit(contextvars.copy_context().run, function).result()


def _shapes_of(invocation: Invocation) -> Invocation:
    shapes = {
        name: None if array is None else jax.ShapeDtypeStruct(array.shape, array.dtype)
        for name, array in invocation.arrays.items()
    }
    return dataclasses.replace(invocation, arrays=shapes)


def _measure(operation: Operation, row: Implementation, invocation: Invocation, device: Device | None) -> TuningReport:
    """Check and time every candidate, remember and write the best."""
    from tqdm import tqdm  # here, so that importing this package stays quick

    is_first_choice = row is operation.configurable(invocation)
    candidates = operation.candidate_cfgs(invocation) if is_first_choice else operation.candidates_of(row, invocation)
    arrays = made_up(invocation)
    expected = _expected(operation, invocation, arrays)
    is_interpreted = row.platform == "triton" and launch.interpreting()
    sets: list[tuple[Any]] = []
    trials = []
    # The bar is shown only where somebody can see it move.
    for candidate in tqdm(candidates, desc=f"tune {operation.name}", unit="candidate", leave=False, disable=None):
        call = _call(operation, invocation, row.platform, candidate)
        try:
            sets = sets or _argument_sets(call, arrays, 1 if is_interpreted else _CALLS_PER_PROGRAM)
            program = timing.compile_program(call, sets)
            if all(_agree(answer, expected) for answer in program.run(0)):
                seconds = _seconds(program, is_interpreted)
                trials.append(Trial(candidate, seconds) if seconds > 0 else Trial(candidate, None, _LOST_IN_NOISE))
            else:
                trials.append(Trial(candidate, None, _WRONG))
        except Exception as error:  # whatever a compiler or a driver raises
            trials.append(Trial(candidate, None, f"{type(error).__name__}: {error}".partition("\n")[0]))
    right = [trial for trial in trials if trial.is_right]
    if not right:
        problems = "; ".join(f"{trial.cfg}: {trial.problem}" for trial in trials)
        raise ValueError(f"tune: none of the {len(trials)} candidates of {operation.name} runs right here: {problems}")
    best = min(right, key=lambda trial: math.inf if trial.seconds is None else trial.seconds)
    tuned_configs.remember(invocation, row.platform, device, Choice(best.cfg, "tuning in this process"))
    microseconds = None if best.seconds is None else round(1e6 * best.seconds, 3)
    facts = {"microseconds": microseconds, "candidates": len(trials)}
    path = tuned_configs.store(invocation, row.platform, device, best.cfg, facts)
    place = tuned_configs.path_for(operation.name, row.platform, device).parent.name
    report = TuningReport(operation.name, row.platform, place, tuple(trials), best.cfg, path)
    _log.log(logging.INFO if len(right) == len(trials) else logging.WARNING, "%s", report)
    for trial in trials:
        if trial.problem == _WRONG:
            words = f"tune: {operation.name} leaves out {trial.cfg}: {_WRONG}"
            warnings.warn(words, RuntimeWarning, stacklevel=1)
    return report


def _expected(operation: Operation, invocation: Invocation, arrays: Mapping[str, Any]) -> Any:
    """What candidates are compared with; `attention` on `xla` holds all scores at once, which may be too many."""
    try:
        return jax.block_until_ready(jax.jit(_call(operation, invocation, "xla", None))(arrays))
    except jax.errors.JaxRuntimeError as error:
        problem = str(error).partition("\n")[0]
        words = f'tune: platform="xla" cannot compute what candidates of {operation.name} are compared with: {problem}'
        raise ValueError(words) from error


def _call(
    operation: Operation, invocation: Invocation, platform: str, cfg: Config | None
) -> Callable[[Mapping[str, Any]], Any]:
    return lambda arrays: operation.execute(dataclasses.replace(invocation, arrays=arrays), platform, cfg)


def _argument_sets(
    call: Callable[..., Any], arrays: Mapping[str, Any], most_calls: int
) -> list[tuple[Mapping[str, Any]]]:
    """Arguments of the calls of a program: so many that launching hides, in too much memory for caches to help."""
    step = jax.jit(call)
    outputs = jax.block_until_ready(step(arrays))
    start = time.perf_counter()
    jax.block_until_ready(step(arrays))
    if most_calls == 1 or time.perf_counter() - start >= _LONG_SECONDS:
        return [(arrays,)]
    output_bytes = max(1, sum(array.nbytes for array in jax.tree.leaves(outputs)))
    num_calls = max(1, min(most_calls, _MOST_OUTPUT_BYTES // output_bytes))
    input_bytes = max(1, sum(array.nbytes for array in jax.tree.leaves(arrays)))
    num_copies = min(num_calls, math.ceil(_COLD_BYTES / input_bytes))
    copies = [arrays, *(jax.tree.map(jnp.copy, arrays) for _ in range(num_copies - 1))]
    return [(copy,) for copy in itertools.islice(itertools.cycle(copies), num_calls)]


def _seconds(program: timing.Program, is_interpreted: bool) -> float:
    """Seconds a call: the median, by the device's clock as far as the host can tell."""
    if is_interpreted:  # such times mean nothing, and take long
        start = time.perf_counter()
        jax.block_until_ready(program.run(0))
        return time.perf_counter() - start
    timed = timing.measure(program.run, calls=program.calls, repeats=ITERATIONS, sample_seconds=0.0, warm_up=WARM_UP)
    return timed.median


def _agree(results: Any, expected: Any) -> bool:
    """Whether results agree to a few roundings of the weights and the output to the result's dtype; caches, exactly."""
    for result, reference in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        if result.dtype.itemsize == 1:
            if not bool(jnp.array_equal(result, reference, equal_nan=jnp.issubdtype(result.dtype, jnp.floating))):
                return False
            continue
        tolerance = 8 * float(jnp.finfo(result.dtype).eps) if result.dtype.itemsize < 4 else 1e-4
        got, wanted = (array.astype(jnp.float32) for array in (result, reference))
        if not bool(jnp.allclose(got, wanted, rtol=tolerance, atol=tolerance, equal_nan=True)):
            return False
    return True


def made_up(invocation: Invocation) -> dict[str, Any]:
    """The arrays of a call; contents where only shapes were given: normal values, full lengths, shuffled pages.

    Of the sequences of `unified_attention`, half decode one token and the others share the rest, where there are enough
    tokens for that.
    """
    rng = np.random.default_rng(0)
    sizes = invocation.sizes
    made: dict[str, Any] = {}
    for name, array in invocation.arrays.items():
        if not isinstance(array, jax.ShapeDtypeStruct):
            made[name] = array
        elif name in ("block_tables", "page_indices"):
            made[name] = rng.integers(0, max(1, sizes.num_pages), array.shape)
        elif name == "slot_mapping":
            made[name] = rng.permutation(max(sizes.num_pages * sizes.page_size, *array.shape))[: array.shape[0]]
        elif name == "query_start_loc":
            made[name] = _starts(sizes.num_tokens, array.shape[0] - 1)
        elif name in ("sequence_start", "q_segment_ids", "kv_segment_ids"):
            made[name] = np.zeros(array.shape)
        elif name in INDEX_ARGUMENTS:
            longest = sizes.kv_len if hasattr(sizes, "kv_len") else sizes.table_width * sizes.page_size
            made[name] = np.full(array.shape, longest)
        elif name in ("k_scale", "v_scale"):
            made[name] = np.full(array.shape, 1 / 32)
        elif jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            made[name] = jax.random.key(0)
        elif name == "dropout_rng":
            made[name] = np.arange(math.prod(array.shape)).reshape(array.shape)
        else:
            values = jax.random.normal(jax.random.key(len(made)), array.shape)
            integers = jnp.issubdtype(array.dtype, jnp.integer)
            made[name] = jnp.round(30 * values) if integers else values
        if isinstance(made[name], (np.ndarray, jax.Array)) and made[name].dtype != array.dtype:
            # Without x64, indices of 64 bits become what implementations take them as.
            made[name] = jnp.asarray(made[name], jax.dtypes.canonicalize_dtype(array.dtype))
    return made


def _starts(num_tokens: int, num_seqs: int) -> np.ndarray:
    decoding = num_seqs // 2 if num_tokens >= 2 * num_seqs else 0
    rest = np.linspace(decoding, num_tokens, num_seqs - decoding + 1).astype(np.int32)
    return np.concatenate([np.arange(decoding, dtype=np.int32), rest])
