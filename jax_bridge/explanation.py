"""What a call would do: the platform, the configuration, and why."""

import dataclasses
from typing import Any

import jax

from jax_bridge import launch, tuned_configs
from jax_bridge.configs import PLATFORMS, Config
from jax_bridge.operation import BACKEND_OF_PLATFORM, Branch, Invocation, Operation, is_usable
from jax_bridge.registry import find_operation
from jax_bridge.sharding import invocation_of_a_call

_PLATFORMS = tuple(platform for platform in PLATFORMS if platform != "auto")


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
        **kwargs: the keyword arguments of the call; with a `mesh` the choices are those of one shard.

    Returns:
        The choices and reasons; `str()` of it reads as text.

    Raises:
        TypeError, ValueError, NotImplementedError: what the call itself raises while it is traced.
    """
    operation = find_operation(op)
    requested = operation.requested_platform(platform, cfg)
    invocation = invocation_of_a_call(operation, args, kwargs)
    branches = operation.branches(invocation, requested, cfg, may_tune=False)
    backend = jax.default_backend() if cfg is None or cfg.backend == "any" else cfg.backend
    branch = _taken(branches, backend)
    row = branch.implementation
    if requested != "auto":
        source = "the argument" if platform not in (None, "auto") else "cfg.platform"
        others = ", ".join(name for name in _PLATFORMS if name != row.platform)
        reasons = [f"platform {row.platform}: {source} says so", f"not {others}: the call names its platform"]
        if row.platform == "triton" and backend != BACKEND_OF_PLATFORM["triton"] and not launch.interpreter_asked_for():
            words = f"where it runs, the {backend} backend raises NotImplementedError"
            reasons.append(f"here it can only be lowered for a GPU: {words}")
    else:
        reasons = [f"platform {row.platform}: chosen for the {backend} backend"]
        reasons += _passed_over(operation, invocation, row.platform, backend)
    if row.platform == "pallas":
        given = "" if branch.cfg.is_open else f"given fields, {branch.cfg}, and otherwise "
        reasons.append(f"configuration: {given}the kernel's own choice of blocks")
    elif row.heuristic_cfg is None:
        reasons.append("configuration: the platform has nothing to configure")
    else:
        given = "given fields, the others " if cfg is not None and not cfg.is_open else ""
        reasons.append(f"configuration: {given}by {branch.source}: {branch.cfg}")
        if tuned_configs.policy() == "autotune" and str(branch.source).startswith("heuristics"):
            reasons.append(f"{tuned_configs.POLICY_VARIABLE}=autotune: such a call tunes first where the kernel runs")
    return Explanation(operation.name, row.platform, branch.cfg, tuple(reasons))


def _taken(branches: tuple[Branch, ...], backend: str) -> Branch:
    for branch in branches:
        if BACKEND_OF_PLATFORM.get(branch.implementation.platform) == backend:
            return branch
    return branches[-1]


def _passed_over(operation: Operation, invocation: Invocation, chosen: str, backend: str) -> list[str]:
    """Why each other platform was not taken."""
    reasons = []
    for platform in _PLATFORMS:
        row = operation.implementation(platform)
        needed = BACKEND_OF_PLATFORM.get(platform, backend)
        if platform == chosen:
            continue
        if row is None:
            reason = "it does not have the operation"
        elif (lack := row.missing(invocation)) is not None:
            reason = f"it does not support {lack}"
        elif platform == "xla":
            reason = "it comes last, for calls that no kernel serves"
        elif platform not in BACKEND_OF_PLATFORM:
            reason = "it is taken only where the call names it"
        elif needed != backend:
            reason = f"it needs a {needed} backend, this is {backend}"
        elif not is_usable(row):
            reason = "what it needs is not installed or does not fit, or it is interpreted"
        else:
            reason = f"{chosen} comes first"
        reasons.append(f"not {platform}: {reason}")
    return reasons
