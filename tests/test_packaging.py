"""The distribution: what is in it, what importing it costs and needs, and that what its README shows is true."""

import doctest
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.new_process import ROOT, run_python

PACKAGES = ("jax_bridge", "pallas_tpu", "reference", "triton_kernels")
LARGEST_IMPORT_SHARE = 0.8  # of what importing jax takes


def sources(*folders: str) -> set[str]:
    """Paths of the Python files and type markers under `folders` of the working tree."""
    files = (path for folder in folders for path in (ROOT / folder).rglob("*"))
    return {path.relative_to(ROOT).as_posix() for path in files if path.suffix == ".py" or path.name == "py.typed"}


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with an sdist and the wheel built from it, from a copy of the tree so that the tree stays as it is."""
    scratch = tmp_path_factory.mktemp("build")
    # Other tests write into hidden folders and caches meanwhile.
    hidden = (".git", ".venv", ".whl", ".gpu", ".hypothesis", ".benchmarks", ".*_cache")
    ignored = shutil.ignore_patterns(*hidden, "pytest-cache-files-*", "__pycache__", "*.egg-info", "build", "dist")
    shutil.copytree(ROOT, scratch / "tree", ignore=ignored)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", f"{scratch}/dist", f"{scratch}/tree"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return scratch / "dist"


def test_wheel_holds_the_packages_and_nothing_else(distributions: Path) -> None:
    (wheel,) = distributions.glob("jax_paged_attention-*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        requirements = archive.read(metadata).decode()

    information = metadata.removesuffix("METADATA")
    assert {name for name in names if not name.startswith(information)} == sources(*PACKAGES)
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    assert f"{information}licenses/LICENSE" in names
    for extra in ("cuda", "tpu", "test", "bench", "dev"):
        assert f"Provides-Extra: {extra}" in requirements
    for requirement in ("jax<0.12,>=0.11", "jax-triton>=0.4.1", "triton>=3.7"):
        assert f"Requires-Dist: {requirement}" in requirements


def test_sdist_can_be_tested_where_it_is_unpacked(distributions: Path) -> None:
    (sdist,) = distributions.glob("jax_paged_attention-*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    files = {"README.md", "CHANGELOG.md", "LICENSE", "Makefile", "constraints.txt", "pyproject.toml", "setup.cfg"}
    assert files | sources(*PACKAGES, "tests", "bench") <= names


def test_constraints_pin_every_requirement() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["test"], *extras["bench"], *extras["dev"]]
    names = {re.split(r"[\[;<>= ]", requirement)[0] for requirement in wanted}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0] for line in lines if not line.startswith("#")}
    assert names - {project["name"]} <= pinned


def test_make_runs_every_test_that_compiles() -> None:
    """They are collected by name, since collecting the others without the interpreter takes long."""
    marked = {path.name for path in (ROOT / "tests").glob("test_*.py") if "pytest.mark.compile" in path.read_text()}
    (command,) = re.findall(r"-m compile((?: \\\n| [\w/.]+|\s)+)", (ROOT / "Makefile").read_text())
    assert {Path(name).name for name in command.split() if name.endswith(".py")} == marked - {Path(__file__).name}


def test_set_up_says_when_there_is_no_suitable_python(tmp_path: Path) -> None:
    command = ["make", "PYTHON=/no/such/python", f"VENV={tmp_path}/venv", "set-up"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "No Python >= 3.12" in done.stderr
    assert "/no/such/python" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_triton_kernels_imports_without_jax() -> None:
    code = f"""
import importlib
for name in {sorted(path.stem for path in (ROOT / "triton_kernels").glob("[a-z]*.py"))!r}:
    importlib.import_module("triton_kernels." + name)
"""
    pytest.importorskip("triton")
    run_python(code, blocked=("jax", "jaxlib", "jax_triton"))


def test_public_calls_work_without_triton() -> None:
    code = """
import jax.numpy as jnp
import jax_bridge
cache = jnp.ones((4, 1, 8, 32))
out = jax_bridge.page_attention(jnp.ones((1, 2, 32)), cache, cache, jnp.array([9]), jnp.array([[2, 1]]))
print(out.shape, bool((out == 1).all()))
"""
    assert run_python(code, blocked=("triton", "jax_triton")).split() == ["(1,", "2,", "32)", "True"]


def test_import_loads_no_kernels() -> None:
    code = """
import sys
import jax_bridge
print(sorted({"triton", "jax_triton", "triton_kernels", "pallas_tpu"} & sys.modules.keys()))
"""
    assert run_python(code).strip() == "[]"


def test_import_adds_little_to_importing_jax() -> None:
    code = """
import time
times = [time.process_time()]
import jax
times.append(time.process_time())
import jax_bridge
times.append(time.process_time())
print((times[2] - times[1]) / (times[1] - times[0]))
"""
    assert min(float(run_python(code)) for _ in range(3)) <= LARGEST_IMPORT_SHARE


@pytest.mark.parametrize("command", ["jax_bridge.tune", "jax_bridge.explain"])
def test_commands_are_modules(command: str) -> None:
    code = f"import runpy; sys.argv = [{command!r}, '--help']; runpy.run_module({command!r}, run_name='__main__')"
    assert f"python -m {command}" in run_python(code)


def test_readme_examples() -> None:
    result = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert result.attempted >= 15
    assert result.failed == 0
