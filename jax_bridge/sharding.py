"""Operations under `jax.shard_map`: sharded over axes whose parts need nothing of one another."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jax_bridge.operation import Invocation, Operation

HEADS = "heads"
BATCH = "batch"

Axes = tuple[str, ...]


def cache_axes(kv_layout: str) -> Axes:
    """The axes of a cache, its KV heads named so that they must be sharded as the query heads are."""
    return tuple(HEADS if letter == "H" else letter for letter in kv_layout)


def scale_axes(invocation: Invocation, argument: str) -> Axes:
    """The axes of a cache's scale: none, one for all heads, or one a KV head."""
    scale = invocation.arrays[argument]
    if scale is None or scale.ndim == 0:
        return ()
    return (HEADS,) if scale.shape[0] == invocation.sizes.num_kv_heads > 1 else ("1",)


def shard_map_wrapper(
    operation: Operation,
    invocation: Invocation,
    axes: Mapping[str, Axes],
    output_axes: Sequence[Axes],
    num_positional: int,
    options: Mapping[str, Any],
    *,
    mesh: Any,
    in_specs: Any,
    out_specs: Any,
    platform: str | None,
    cfg: Any,
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The operation under `jax.shard_map`, and the arrays to call it with.

    Args:
        operation: what runs on each shard.
        invocation: the checked call; its arrays stand in the order of the signature.
        axes: the axes of every array argument; equal names must be sharded equally, only `HEADS` and `BATCH` at all.
        output_axes: the axes of the output and of the LSE.
        num_positional: how many array arguments are positional only.
        options: the keyword arguments of the call.
        mesh: the mesh.
        in_specs: specs of the array arguments in order, absent ones left out or not.
        out_specs: spec of the output, or a pair of specs with an LSE.
        platform: passed on.
        cfg: passed on.

    Returns:
        `(function, arrays)`.
    """
    if not isinstance(mesh, (Mesh, AbstractMesh)) or in_specs is None or out_specs is None:
        got = f"mesh is {mesh!r}, in_specs is {in_specs!r}, out_specs is {out_specs!r}"
        raise TypeError(f"{operation.name}: {got}, expected a Mesh with both specs")
    arrays = {name: array for name, array in invocation.arrays.items() if array is not None}
    specs = _aligned_specs(operation.name, in_specs, invocation.arrays, axes)
    is_pair = isinstance(out_specs, (tuple, list)) and not isinstance(out_specs, PartitionSpec)
    has_lse = invocation.options.return_lse
    if is_pair != has_lse or (is_pair and len(out_specs) != 2):
        expected = "a pair of PartitionSpecs, for the output and the LSE" if has_lse else "one PartitionSpec"
        raise ValueError(f"{operation.name}: out_specs is {out_specs!r}, expected {expected}")
    answers = tuple(out_specs) if is_pair else (out_specs,)
    named_outputs = zip(("out_specs", "out_specs[1]"), output_axes, strict=True)
    checked_outputs = [(name, spec, out) for (name, out), spec in zip(named_outputs, answers, strict=False)]
    _check_agreement(
        operation.name,
        mesh,
        [(f"in_specs of {name}", spec, axes[name]) for name, spec in specs.items()] + checked_outputs,
    )
    _check_shares(operation.name, mesh, {name: (spec, arrays[name].shape) for name, spec in specs.items()})
    names = tuple(invocation.arrays)
    static = {name: value for name, value in options.items() if name not in arrays}

    def run_shard(*shards: Any) -> Any:
        named = dict(zip(specs, shards, strict=True))
        positional = [named.pop(name, None) for name in names[:num_positional]]
        return operation.run(*positional, platform=platform, cfg=cfg, **static, **named)

    # The checks of varying axes know no kernels; agreement was checked above.
    function = jax.shard_map(
        run_shard,
        mesh=mesh,
        in_specs=tuple(specs.values()),
        out_specs=answers if is_pair else answers[0],
        check_vma=False,
    )
    return _taking_any_sharding(function, mesh, tuple(specs.values())), tuple(arrays.values())


def _taking_any_sharding(function: Callable[..., Any], mesh: Any, specs: Sequence[PartitionSpec]) -> Callable[..., Any]:
    """`function` of arrays that lie anywhere: over explicit axes of a mesh, JAX wants them to lie as the specs say."""
    explicit = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}
    if not explicit:
        return function

    def placed(*arrays: Any) -> Any:
        places = (PartitionSpec(*(_those_of(explicit, entry) for entry in spec)) for spec in specs)
        moved = [
            jax.sharding.reshard(array, NamedSharding(mesh, place)) for array, place in zip(arrays, places, strict=True)
        ]
        return function(*moved)

    return placed


def _those_of(names: set[str], entry: Any) -> Any:
    """The mesh axes of an entry of a spec that are among `names`."""
    return tuple(name for name in _mesh_axes(entry) if name in names) or None


def _mesh_axes(entry: Any) -> tuple[str, ...]:
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def invocation_of_a_call(operation: Operation, args: Sequence[Any], options: Mapping[str, Any]) -> Invocation:
    """The checked call that these arguments are; with those of sharding, what one device of the mesh gets."""
    names = ("mesh", "in_specs", "out_specs")
    others = {name: value for name, value in options.items() if name not in names}
    if all(options.get(name) is None for name in names):
        return operation.checked(*args, **others)
    return _invocation_of_a_shard(operation, args, others, {name: options.get(name) for name in names})


def _invocation_of_a_shard(
    operation: Operation, args: Sequence[Any], options: Mapping[str, Any], sharding: Mapping[str, Any]
) -> Invocation:
    operation.sharding_wrapper([name for name, value in sharding.items() if value is not None])
    invocations: list[Invocation] = []

    def run(*shards: Any, platform: Any, cfg: Any, **options: Any) -> Any:
        del platform, cfg
        invocations.append(operation.invocation(*shards, **options))
        outputs = operation.outputs(invocations[-1])
        return jax.tree.map(lambda output: jnp.zeros(output.shape, output.dtype), outputs)

    recorder: Any = copy.copy(operation)
    recorder.run = run
    function, arrays = recorder.create_shard_map_wrapper(*args, **options, **sharding)
    jax.eval_shape(function, *arrays)
    return invocations[-1]


def _aligned_specs(
    operation: str, in_specs: Any, arrays: Mapping[str, Any], axes: Mapping[str, Axes]
) -> dict[str, PartitionSpec]:
    """The spec of every array that is present; arrays of one element may go without."""
    if isinstance(in_specs, PartitionSpec) or not isinstance(in_specs, (tuple, list)):
        raise TypeError(f"{operation}: in_specs is {in_specs!r}, expected a tuple of PartitionSpecs")
    present = [name for name, array in arrays.items() if array is not None]
    needed = [name for name in present if name not in ("k_scale", "v_scale") or axes[name] == (HEADS,)]
    for names in (list(arrays), present, needed):
        if len(names) == len(in_specs):
            given = dict(zip(names, in_specs, strict=True))
            specs = {name: given.get(name, PartitionSpec()) for name in present}
            return {name: PartitionSpec() if spec is None else spec for name, spec in specs.items()}
    got = f"in_specs has {len(in_specs)} entries"
    raise ValueError(f"{operation}: {got}, expected {len(present)}: {', '.join(present)}")


def _check_agreement(operation: str, mesh: Any, entries: Sequence[tuple[str, PartitionSpec, Axes]]) -> None:
    chosen: dict[str, tuple[str, tuple[Any, ...]]] = {}
    for argument, spec, axes in entries:
        if not isinstance(spec, PartitionSpec):
            raise TypeError(f"{operation}: {argument} is {spec!r}, expected a PartitionSpec")
        if len(spec) > len(axes):
            raise ValueError(f"{operation}: {argument} is {spec}, expected at most {len(axes)} entries")
        for axis, entry in zip(axes, (*spec, *[None] * (len(axes) - len(spec))), strict=True):
            mesh_axes = _mesh_axes(entry)
            if unknown := [name for name in mesh_axes if name not in mesh.axis_names]:
                raise ValueError(
                    f"{operation}: {argument} names {unknown}, expected axes of the mesh {mesh.axis_names}"
                )
            if axis not in (HEADS, BATCH):
                if mesh_axes:
                    raise ValueError(
                        f"{operation}: {argument} shards axis {axis}, expected only batch or heads sharded"
                    )
                continue
            source, known = chosen.setdefault(axis, (argument, mesh_axes))
            if known != mesh_axes:
                got = f"{argument} shards the {axis} over {mesh_axes}"
                raise ValueError(f"{operation}: {got}, expected {known} as in {source}")


def _check_shares(operation: str, mesh: Any, entries: Mapping[str, tuple[PartitionSpec, tuple[int, ...]]]) -> None:
    """Check that every sharded axis can be cut into as many equal parts as there are devices along it."""
    for argument, (spec, shape) in entries.items():
        for place, entry in enumerate(spec):
            parts = math.prod(mesh.shape[name] for name in _mesh_axes(entry))
            if shape[place] % parts:
                got = f"{argument} has shape {tuple(shape)}"
                raise ValueError(
                    f"{operation}: {got}, expected a multiple of {parts} along axis {place}, which {entry!r} shards"
                )
