"""What every operation shares: from checked arguments to a platform, a configuration and one compiled program."""

import abc
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.extend
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir

from jax_bridge import launch, tuned_configs
from jax_bridge.configs import PLATFORMS, Config, completed, warp_specialization
from jax_bridge.device import Device, current_device
from jax_bridge.tuned_configs import Choice
from jax_bridge.validation import FLOAT, describe, to_int32
from reference import paging

Outputs = jax.Array | tuple[jax.Array, ...]
_LOWERING_NAMES = {"triton": "cuda", "pallas": "tpu"}
BACKEND_OF_PLATFORM = {"triton": "gpu", "pallas": "tpu"}
_PLATFORM_OF_BACKEND = {backend: platform for platform, backend in BACKEND_OF_PLATFORM.items()}
_BACKENDS_OF_PLATFORM = {
    "triton": ("gpu", "cpu"),
    "pallas": ("tpu", "cpu"),
    "cuda": ("gpu",),
    "xla": ("cpu", "gpu", "tpu"),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Invocation:
    """One call of an operation, after validation.

    Attributes:
        operation: the operation's name.
        arrays: the array arguments by name (arrays, tracers or `jax.ShapeDtypeStruct`); absent optional ones are None.
            What an implementation receives is normalised: indices are int32, scales of a cache are float32 of shape
            `[1]` or `[Hkv]`, sinks, slopes and biases are float32, float16 or bfloat16.
        options: the static arguments, a frozen dataclass of the operation.
        sizes: the sizes of the axes, a frozen dataclass of the operation.
    """

    operation: str
    arrays: Mapping[str, Any]
    options: Any
    sizes: Any

    @functools.cached_property
    def is_symbolic(self) -> bool:
        """Whether a size is one of `jax.export.symbolic_shape`."""
        shapes = (array.shape for array in self.arrays.values() if array is not None)
        return not all(paging.is_static(*shape) for shape in shapes)


def _supports_everything(invocation: Invocation) -> str | None:
    del invocation
    return None


def _always() -> bool:
    return True


def _no_candidates(invocation: Invocation, device: Device) -> tuple[Config, ...]:
    del invocation, device
    return ()


def _accepts_everything(invocation: Invocation, cfg: Any, device: Device) -> None:
    del invocation, cfg, device


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One operation on one platform.

    Attributes:
        platform: `"triton"`, `"pallas"`, `"xla"` or `"cuda"`.
        call: computes the operation from a normalised invocation, a complete configuration and the `Device`, which is
            None without `heuristic_cfg`; traced.
        lacks: words for the first feature asked for that is not supported, or None.
        heuristic_cfg: the configuration for static sizes and a device; None where there is nothing to configure. Where
            configurations have `warp_specialized`, a third argument may demand what it is.
        candidate_cfgs: the configurations that tuning may try.
        is_available: whether what it needs is installed and works; asked for `"auto"` only.
        check_cfg: raises where it cannot run a call as a complete configuration asks: NotImplementedError, upon which
            `"auto"` takes another platform, or ValueError.
    """

    platform: str
    call: Callable[[Invocation, Any, Any], Outputs]
    lacks: Callable[[Invocation], str | None] = _supports_everything
    heuristic_cfg: Callable[..., Config] | None = None
    candidate_cfgs: Callable[[Invocation, Device], tuple[Config, ...]] = _no_candidates
    is_available: Callable[[], bool] = _always
    check_cfg: Callable[[Invocation, Any, Device], None] = _accepts_everything

    def missing(self, invocation: Invocation) -> str | None:
        """Words for the first thing about the call that is not supported, or None."""
        if self.platform != "xla" and invocation.is_symbolic:
            return "symbolic sizes: kernels are made for the sizes of their arrays"
        return self.lacks(invocation)


@dataclasses.dataclass(frozen=True)
class Branch:
    """An implementation with everything static that its program depends on besides the arguments.

    Attributes:
        implementation: what runs.
        cfg: the configuration, complete where the implementation has heuristics.
        device: the device that it is specialised for, if the implementation has heuristics.
        source: where the fields come from that the call leaves open, in words; None where nothing was to be chosen.
    """

    implementation: Implementation
    cfg: Config
    device: Device | None
    source: str | None = dataclasses.field(default=None, compare=False)  # two calls that differ in it share a program


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The static half of a call; of several branches, the lowering platform picks one, the last by default."""

    operation: "type[Operation]"
    options: Any
    sizes: Any
    branches: tuple[Branch, ...]


class Operation(abc.ABC):
    """Base of the operation objects: checks the arguments, chooses platform and configuration, runs.

    Subclasses name the operation, list its implementations, and write `outputs` and `invocation`, whose signature is
    that of the public function without `platform`, `cfg` and the arguments of sharding. Implementations are not called
    for empty outputs.
    """

    name: ClassVar[str]
    config_type: ClassVar[type[Config]]
    implementations: ClassVar[tuple[Implementation, ...]]

    @staticmethod
    @abc.abstractmethod
    def outputs(invocation: Invocation) -> Any:
        """Shapes and dtypes of what an implementation answers: a `jax.ShapeDtypeStruct` or a tuple of them."""

    @abc.abstractmethod
    def invocation(self, *args: Any, **kwargs: Any) -> Invocation:
        """Check the arguments of a call; raises `ValueError` or `TypeError` naming what is wrong."""

    def run(
        self,
        *args: Any,
        platform: str | None = None,
        cfg: Config | None = None,
        mesh: Any = None,
        in_specs: Any = None,
        out_specs: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Run the operation on the arguments of its public function.

        Args:
            *args: positional arguments of the public function.
            platform: the platform, None or `"auto"` to choose.
            cfg: the configuration, None to choose.
            mesh: as in the operations that take one: run under `jax.shard_map`.
            in_specs: likewise.
            out_specs: likewise.
            **kwargs: keyword arguments of the public function.

        Returns:
            What the public function returns.

        Raises:
            TypeError: an argument of the wrong type or dtype.
            ValueError: an argument of the wrong shape or value, or an unknown platform.
            NotImplementedError: the platform does not support what is asked for.
        """
        sharding = {"mesh": mesh, "in_specs": in_specs, "out_specs": out_specs}
        if given := [name for name, value in sharding.items() if value is not None]:
            wrap = self.sharding_wrapper(given)
            function, arrays = wrap(*args, platform=platform, cfg=cfg, **sharding, **kwargs)
            return function(*arrays)
        requested = self.requested_platform(platform, cfg)
        invocation = self.checked(*args, **kwargs)
        try:
            return self.execute(invocation, requested, cfg)
        except TypeError:
            for name, array in invocation.arrays.items():
                if isinstance(array, jax.ShapeDtypeStruct):  # which traces take, unless they need a value
                    raise TypeError(f"{self.name}: {name} is {array}, expected an array") from None
            raise

    def checked(self, *args: Any, **kwargs: Any) -> Invocation:
        """As `invocation`, for arguments whose names nobody has checked."""
        try:
            return self.invocation(*args, **kwargs)
        except TypeError:
            self.check_names(*args, **kwargs)
            raise

    def check_names(self, *args: Any, **kwargs: Any) -> None:
        """Refuse arguments of which some are missing or unknown, by the operation's name."""
        try:
            inspect.signature(self.invocation).bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self.name}: {error}, expected the arguments of its public function") from None

    def sharding_wrapper(self, given: Sequence[str]) -> Callable[..., tuple[Callable[..., Any], tuple[Any, ...]]]:
        """`create_shard_map_wrapper`, for a call that has the arguments `given` of sharding.

        Raises:
            TypeError: the operation takes none.
        """
        wrapper: Any = getattr(self, "create_shard_map_wrapper", None)
        if wrapper is None:
            raise TypeError(f"{self.name}: {', '.join(given)} given, expected none: use it inside jax.shard_map")
        return wrapper

    def execute(self, invocation: Invocation, requested: str, cfg: Config | None) -> Any:
        """Run a checked call on the platform `requested`."""
        branches = self.branches(invocation, requested, cfg)
        return _execute(_Plan(type(self), invocation.options, invocation.sizes, branches), invocation.arrays)

    def get_impl(self, cfg: Config | None = None) -> Callable[..., Any]:
        """The operation as a function of its arguments, with the platform and launch parameters of `cfg`."""
        self.requested_platform(None, cfg)
        return functools.partial(self.run, cfg=cfg)

    def heuristic_cfg(self, invocation: Invocation) -> Config:
        """The configuration that the heuristics choose, for the GPU at hand or the target device.

        The platform is the one that `"auto"` takes there; without a configurable implementation all fields stay open.
        """
        implementation = self.configurable(invocation)
        if implementation is None or implementation.heuristic_cfg is None:
            return self.config_type()
        return implementation.heuristic_cfg(invocation, current_device())

    def candidate_cfgs(self, invocation: Invocation) -> tuple[Config, ...]:
        """The configurations worth timing for this call, on the GPU at hand or the target device.

        The first is the one of `heuristic_cfg`, and the only one where there is nothing to choose.
        """
        implementation = self.configurable(invocation)
        return self.candidates_of(implementation, invocation)

    def candidates_of(self, row: Implementation | None, invocation: Invocation) -> tuple[Config, ...]:
        """As `candidate_cfgs`, for the implementation `row`."""
        if row is None or row.heuristic_cfg is None:
            return (self._open_cfg,)
        device = current_device()
        return tuple(dict.fromkeys((row.heuristic_cfg(invocation, device), *row.candidate_cfgs(invocation, device))))

    def configurable(self, invocation: Invocation) -> Implementation | None:
        """The kernel for a GPU or else a TPU that supports a call, if there is one."""
        usable = (self.implementation(platform) for platform in _LOWERING_NAMES)
        return next((row for row in usable if row is not None and row.missing(invocation) is None), None)

    def implementation(self, platform: str) -> Implementation | None:
        """The implementation for a platform, if there is one."""
        return next((row for row in self.implementations if row.platform == platform), None)

    def requested_platform(self, platform: Any, cfg: Any) -> str:
        """The platform that a call names, the argument before the configuration; `"auto"` where neither does."""
        if cfg is not None and not isinstance(cfg, self.config_type):
            expected = f"{self.config_type.__name__} or None"
            raise TypeError(f"{self.name}: cfg is {describe(cfg)}, expected {expected}")
        if platform is not None and (not isinstance(platform, str) or platform not in PLATFORMS):
            expected = f"None or one of {', '.join(PLATFORMS)}"
            raise ValueError(f"{self.name}: platform is {platform!r}, expected {expected}")
        requested: str = platform or "auto"
        if requested == "auto" and cfg is not None:
            requested = cfg.platform
        backend = "any" if cfg is None else cfg.backend
        if requested != "auto" and backend != "any" and backend not in _BACKENDS_OF_PLATFORM[requested]:
            expected = f"any or {' or '.join(_BACKENDS_OF_PLATFORM[requested])} for platform {requested!r}"
            raise ValueError(f"{self.name}: cfg.backend is {backend!r}, expected {expected}")
        return requested

    def branches(
        self, invocation: Invocation, requested: str, cfg: Config | None, *, may_tune: bool = True
    ) -> tuple[Branch, ...]:
        """The implementations that a call may run: one, or for `"auto"` one for each platform to lower for.

        Args:
            invocation: the checked call.
            requested: what `requested_platform` answered.
            cfg: the configuration that the call names, or None.
            may_tune: whether the policy `"autotune"` is followed.
        """
        may_tune = tuned_configs.policy() == "autotune" and may_tune
        if requested != "auto":
            return (self._branch(self._supported(invocation, requested), invocation, cfg, may_tune),)
        rows = self._automatic(invocation, "any" if cfg is None else cfg.backend)
        branches = []
        for row in rows:
            try:
                branches.append(self._branch(row, invocation, cfg, may_tune))
            except NotImplementedError:
                if row is rows[-1]:
                    raise
        return tuple(branches)

    @functools.cached_property
    def _open_cfg(self) -> Config:
        return self.config_type()

    def _branch(self, row: Implementation, invocation: Invocation, cfg: Config | None, may_tune: bool) -> Branch:
        """Explicit configuration before tuned one, in memory or on disk, before autotuning before heuristics.

        A configuration that leaves fields open gets these from what comes next; autotuning is for those that fix none.
        """
        if row.heuristic_cfg is None:
            return Branch(row, cfg or self._open_cfg, None)
        device = current_device()
        heuristic_cfg = functools.partial(row.heuristic_cfg, invocation, device)
        choice = tuned_configs.find(invocation, row.platform, device, heuristic_cfg)
        if choice is None and may_tune and (cfg is None or cfg.is_open):
            from jax_bridge import tuning  # builds on operations

            choice = tuning.autotuned(self, row, invocation, device)
        if choice is None:
            key = (row.heuristic_cfg, tuned_configs.call_key(invocation, row.platform, device))
            if (choice := _heuristic_choices.get(key)) is None:
                choice = Choice(heuristic_cfg(), f"heuristics for {device.name}")
                _heuristic_choices[key] = choice
        if cfg is None:
            return Branch(row, choice.cfg, device, choice.source)
        specialized = warp_specialization(cfg)
        if specialized is not None and specialized != getattr(choice.cfg, "warp_specialized", specialized):
            choice = Choice(row.heuristic_cfg(invocation, device, specialized), f"heuristics for {device.name}")
        complete = completed(cfg, choice.cfg)
        row.check_cfg(invocation, complete, device)
        return Branch(row, complete, device, choice.source)

    def _supported(self, invocation: Invocation, platform: str) -> Implementation:
        row = self.implementation(platform)
        lack = "this operation" if row is None else row.missing(invocation)
        if row is None or lack is not None:
            raise self._unsupported(invocation, platform, str(lack))
        return row

    def _unsupported(self, invocation: Invocation, platform: str, lack: str) -> NotImplementedError:
        others = (row.platform for row in reversed(self.implementations) if row.missing(invocation) is None)
        remedy = next((f'use platform="{other}"' for other in others), "use the call without it")
        return NotImplementedError(f"{self.name}[{platform}] does not support {lack}; {remedy}")

    def _automatic(self, invocation: Invocation, backend: str) -> tuple[Implementation, ...]:
        """Kernels for the hardware they exist for, `xla` everywhere else."""
        native = _PLATFORM_OF_BACKEND.get(jax.default_backend() if backend == "any" else backend)
        xla = self.implementation("xla")
        if xla is not None and xla.missing(invocation) is not None:
            xla = None
        is_eager = not any(isinstance(array, jax.core.Tracer) for array in invocation.arrays.values())
        if xla is not None and native is None and backend == "any" and is_eager:
            return (xla,)  # it runs here, where no kernel does: spare it the import and the tracing of one
        kernels = [row for row in self.implementations if row.platform in _LOWERING_NAMES]
        kernels = [row for row in kernels if row.missing(invocation) is None and is_usable(row)]
        if xla is None or backend != "any":
            here = tuple(row for row in kernels if row.platform == native)
            return here or (self._supported(invocation, "xla"),)
        return (*kernels, xla)


_heuristic_choices: dict[Any, Choice] = {}  # heuristics are pure, and eager calls are many


def is_usable(row: Implementation) -> bool:
    """Whether `"auto"` may take a kernel: what it needs is installed, and it is compiled, not interpreted."""
    if row.platform == "triton" and (launch.interpreter_asked_for() or current_device().vendor != "nvidia"):
        return False
    return row.is_available()


INDEX_ARGUMENTS = frozenset(
    {
        "context_lens",
        "context_len",
        "kv_lens",
        "block_tables",
        "page_indices",
        "query_start_loc",
        "sequence_start",
        "sequence_end",
        "slot_mapping",
        "key_lengths",
    }
)
_SCORE_TERMS = frozenset({"attention_sink", "alibi_slopes", "qq_bias", "softmax_aux", "bias"})


def _normalised(name: str, array: Any) -> Any:
    """An array as implementations take it; costs nothing where it is so already."""
    if array is None:
        return None
    if name in INDEX_ARGUMENTS:
        return to_int32(array).reshape(-1) if name == "context_len" else to_int32(array)
    if name in ("k_scale", "v_scale"):
        return array.astype(jnp.float32).reshape(-1)
    if name in _SCORE_TERMS and not FLOAT.accepts(array.dtype):
        return array.astype(jnp.float32)
    return array


@functools.partial(jax.jit, static_argnums=0)
def _execute(plan: _Plan, arrays: Mapping[str, Any]) -> Any:
    with jax.named_scope(plan.operation.name):
        arrays = {name: _normalised(name, array) for name, array in arrays.items()}
        outputs = plan.operation.outputs(_invocation(plan, arrays))
        if jax.tree.leaves(outputs)[0].size == 0:
            return jax.tree.map(lambda output: jnp.zeros(output.shape, output.dtype), outputs)
        *kernels, default = (functools.partial(_run_branch, plan, branch) for branch in plan.branches)
        if not kernels:
            platform = plan.branches[-1].implementation.platform
            if platform in _LOWERING_NAMES:
                alone = functools.partial(_lowered_alone_p.bind, operation=plan.operation.name, platform=platform)
                arrays = jax.tree.map(alone, arrays)
            return default(arrays)
        names = [_LOWERING_NAMES[branch.implementation.platform] for branch in plan.branches[:-1]]

        @jax.custom_jvp
        def choose(arrays: Mapping[str, Any]) -> Any:
            return jax.lax.platform_dependent(arrays, default=default, **dict(zip(names, kernels, strict=True)))

        @choose.defjvp
        def differentiate(primals: Any, tangents: Any) -> Any:
            # Kernels have no derivatives: "auto" takes the implementation that has what is asked for.
            return jax.jvp(default, primals, tangents)

        return choose(arrays)


# Identity on the arrays of a kernel asked for by name, which refuses to be lowered for several platforms at once, or
# where it is interpreted for others than the CPU. The kernel itself cannot refuse the former: JAX lowers each branch of
# "auto" for all of them, though it takes it on one only.
_lowered_alone_p = jax.extend.core.Primitive("lowered_alone")
_lowered_alone_p.def_impl(lambda array, **_: array)
_lowered_alone_p.def_abstract_eval(lambda array, **_: array)
batching.defvectorized(_lowered_alone_p)
ad.primitive_jvps[_lowered_alone_p] = lambda primals, tangents, **of: (_lowered_alone_p.bind(*primals, **of), *tangents)


def _lower_alone(context: Any, array: Any, *, operation: str, platform: str) -> Any:
    platforms = context.module_context.platforms
    if len(platforms) > 1:
        raise NotImplementedError(
            f"{operation}[{platform}] does not support lowering for {' and '.join(platforms)} at once; "
            'use platform="auto"'
        )
    if platform == "triton" and platforms != ("cpu",) and launch.interpreting():
        raise NotImplementedError(
            f"{operation}[triton] does not support lowering for {platforms[0].upper()} where TRITON_INTERPRET=1 was "
            'set before the first import: its kernels run in the interpreter of Triton, on CPUs; use platform="xla"'
        )
    return [array]


mlir.register_lowering(_lowered_alone_p, _lower_alone)


def _invocation(plan: _Plan, arrays: Mapping[str, Any]) -> Invocation:
    return Invocation(plan.operation.name, arrays, plan.options, plan.sizes)


def _run_branch(plan: _Plan, branch: Branch, arrays: Mapping[str, Any]) -> Any:
    with jax.numpy_rank_promotion("allow"):  # a caller may forbid it in code of their own
        return branch.implementation.call(_invocation(plan, arrays), branch.cfg, branch.device)


def window_argument(window: tuple[int, int | None] | None) -> int | tuple[int, int] | None:
    """A normalised window as the reference takes it: an int where the right side is open."""
    if window is None:
        return None
    left, right = window
    return left + 1 if right is None else (left, right)
