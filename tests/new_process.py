"""Code in an interpreter of its own, for what holds of a process: imports, the environment, the first trace."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run_python(
    code: str, *options: str, blocked: tuple[str, ...] = (), first: tuple[Path, ...] = (), interprets: bool = True
) -> str:
    """Standard output of `code` on the CPU.

    Args:
        code: what to run.
        *options: of the interpreter.
        blocked: modules whose import fails.
        first: folders in which modules are looked for before those of this project.
        interprets: whether kernels are interpreted if they are here.
    """
    block = f"import sys; sys.modules.update(dict.fromkeys({blocked!r}))\n"
    path = os.pathsep.join(map(str, (*first, ROOT)))
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    if not interprets:
        environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, *options, "-c", block + code]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout
