"""What a call would do: the platform, the configuration, and why."""

import dataclasses
from typing import Any

import jax

from jax_bridge.configs import Config
from jax_bridge.operation import BACKEND_OF_PLATFORM, Branch, Invocation, Operation, is_usable
from jax_bridge.registry import find_operation


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The choices of one call.

    Attributes:
        operation: the operation's name.
        platform: the platform that the call runs on here.
        cfg: the complete launch configuration.
        reasons: why, a sentence each.
    """

    operation: str
    platform: str
    cfg: Config
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join((f"{self.operation}[{self.platform}]", *(f"  {reason}" for reason in self.reasons)))


def explain(op: Any, *args: Any, platform: str | None = None, cfg: Config | None = None, **kwargs: Any) -> Explanation:
    """Say which platform and configuration a call takes on this machine, and why; runs nothing.

    Args:
        op: an operation's name, function or object.
        *args: the arguments of the call; arrays or `jax.ShapeDtypeStruct`s.
        platform: as in the call.
        cfg: as in the call.
        **kwargs: the keyword arguments of the call.

    Returns:
        The choices and reasons; `str()` of it reads as text.

    Raises:
        TypeError, ValueError, NotImplementedError: what the call itself raises.
    """
    operation = find_operation(op)
    requested = operation.requested_platform(platform, cfg)
    invocation = operation.invocation(*args, **kwargs)
    branches = operation.branches(invocation, requested, cfg)
    backend = jax.default_backend()
    branch = _taken(branches, backend)
    row = branch.implementation
    if requested != "auto":
        source = "the argument" if platform not in (None, "auto") else "cfg.platform"
        reasons = [f"platform {row.platform}: {source} says so"]
    else:
        reasons = [f"platform {row.platform}: chosen for the {backend} backend"]
        reasons += _passed_over(operation, invocation, row.platform, backend)
    if row.heuristic_cfg is None:
        reasons.append("configuration: the platform has nothing to configure")
    else:
        given = "given fields, the others " if cfg is not None else ""
        name = branch.device.name if branch.device is not None else backend
        reasons.append(f"configuration: {given}by heuristics for {name}: {branch.cfg}")
    return Explanation(operation.name, row.platform, branch.cfg, tuple(reasons))


def _taken(branches: tuple[Branch, ...], backend: str) -> Branch:
    for branch in branches:
        if BACKEND_OF_PLATFORM.get(branch.implementation.platform) == backend:
            return branch
    return branches[-1]


def _passed_over(operation: Operation, invocation: Invocation, chosen: str, backend: str) -> list[str]:
    """Why each kernel platform was not taken."""
    reasons = []
    for platform, needed in BACKEND_OF_PLATFORM.items():
        row = operation.implementation(platform)
        if platform == chosen:
            continue
        if row is None:
            reasons.append(f"not {platform}: it does not have the operation")
        elif (lack := row.lacks(invocation)) is not None:
            reasons.append(f"not {platform}: it does not support {lack}")
        elif needed != backend:
            reasons.append(f"not {platform}: it needs a {needed} backend, this is {backend}")
        elif not is_usable(row):
            reasons.append(f"not {platform}: what it needs is not installed or does not fit, or it is interpreted")
    return reasons
