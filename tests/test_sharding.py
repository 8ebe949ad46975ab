"""Operations under `shard_map` equal one device; specs that would be wrong are refused."""

from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_bridge.registry import OPERATIONS as OBJECTS
from tests.small_calls import PAGED, arguments, assert_close, optional_arrays, run

QUANTISED = {"k_scale", "v_scale"}


def mesh(*shape: int) -> Mesh:
    axes = ("batch", "heads")[-len(shape) :]
    return Mesh(np.asarray(jax.devices()[: int(np.prod(shape))]).reshape(shape), axes)


def two_devices() -> Mesh:
    return Mesh(np.asarray(jax.devices()[:2]), ("x",))


SHARDED = {
    "prefill_page_attention": (
        PartitionSpec(None, "x"),
        PartitionSpec("x"),
        PartitionSpec("x"),
        PartitionSpec(),
        PartitionSpec(),
    ),
    "ragged_decode_attention": (PartitionSpec("x"),) * 5,
}
OUT = {"prefill_page_attention": PartitionSpec(None, "x"), "ragged_decode_attention": PartitionSpec("x")}


needs_devices = pytest.mark.skipif(
    "jax.device_count() < 4", reason="conftest makes eight devices out of a CPU; a GPU host may have one"
)


@needs_devices
@pytest.mark.parametrize("layout", ["PTHD", "PHTD", "HPTD"])
@pytest.mark.parametrize("scale", ["per_head", "number"])
def test_sharded_prefill_equals_one_device(layout: str, scale: str) -> None:
    operation = "prefill_page_attention"
    named = arguments(operation) | {name: a for name, a in optional_arrays(operation).items() if name not in QUANTISED}
    order = ["HPTD".index(axis) for axis in layout]
    named |= {name: named[name].transpose(order) for name in ("key_cache", "value_cache")}
    cache = PartitionSpec(*("heads" if axis == "H" else None for axis in layout))
    heads = PartitionSpec("heads")
    specs = [PartitionSpec(None, "heads"), cache, cache, PartitionSpec(), PartitionSpec(), heads, heads]
    if scale == "per_head":
        named |= {name: optional_arrays(operation)[name] for name in QUANTISED}
        specs += [heads, heads]
    else:
        named |= {"k_scale": 0.7, "v_scale": 1.4}
    options = {"kv_layout": layout, "return_lse": True}
    rows = PartitionSpec(None, "heads")
    sharded = run(operation, named, mesh=mesh(2), in_specs=specs, out_specs=(rows, rows), **options)
    assert sharded[0].sharding.spec == rows
    assert_close(sharded, run(operation, named, **options))


@needs_devices
@pytest.mark.parametrize("sinks", [None, "shared", "per_head"])
@pytest.mark.parametrize("rank", [3, 4])
def test_sharded_ragged_decode_equals_one_device(sinks: str | None, rank: int) -> None:
    operation = "ragged_decode_attention"
    named = arguments(operation)
    dense, rows = PartitionSpec("batch", None, "heads"), PartitionSpec("batch")
    query = PartitionSpec("batch", "heads") if rank == 3 else dense
    if rank == 4:
        named["query"] = named["query"][:, None]
    specs = [query, dense, dense, rows, rows]
    if sinks is not None:
        values = optional_arrays(operation)["softmax_aux"]
        named["softmax_aux"] = values if sinks == "per_head" else values[0]
        specs.append(PartitionSpec("heads") if sinks == "per_head" else PartitionSpec())
    else:
        specs.append(PartitionSpec())
    for given in (specs, specs[:5]) if sinks is None else (specs,):
        sharded = run(operation, named, mesh=mesh(2, 2), in_specs=tuple(given), out_specs=query)
        assert_close(sharded, run(operation, named))


@needs_devices
def test_shard_map_wrapper_under_jit() -> None:
    """The wrapper is a function of arrays: it takes others of the same shapes, and works under `jit`."""
    operation = OBJECTS["ragged_decode_attention"]
    first, second = (tuple(arguments(operation.name, seed).values()) for seed in (0, 1))
    rows = PartitionSpec("heads")
    function, arrays = operation.create_shard_map_wrapper(  # type: ignore[attr-defined]
        *first, mesh=mesh(2), in_specs=(rows,) * 5, out_specs=rows, platform="xla"
    )
    assert len(arrays) == 5
    assert_close(jax.jit(function)(*second), operation.run(*second))


@needs_devices
@pytest.mark.parametrize("operation", SHARDED)
@pytest.mark.parametrize("is_jitted", [False, True])
def test_meshes_of_explicit_axes(operation: str, is_jitted: bool) -> None:
    """As `jax.make_mesh` makes them; arrays may lie as the specs say, or anywhere."""
    explicit = jax.make_mesh((2,), ("x",))
    sharding = {"mesh": explicit, "in_specs": SHARDED[operation], "out_specs": OUT[operation]}
    named = arguments(operation)
    placed = {
        name: jax.device_put(array, NamedSharding(explicit, spec))
        for (name, array), spec in zip(named.items(), SHARDED[operation], strict=True)
    }
    expected = run(operation, named)
    for given in (named, jax.device_put(named), placed):
        call = jax.jit(lambda named: run(operation, named, **sharding)) if is_jitted else None
        assert_close(call(given) if call else run(operation, given, **sharding), expected)


@needs_devices
@pytest.mark.parametrize("operation", SHARDED)
def test_operation_objects_shard(operation: str) -> None:
    """`run` and `get_impl` take what the function takes."""
    named = arguments(operation)
    sharding = {"mesh": two_devices(), "in_specs": SHARDED[operation], "out_specs": OUT[operation]}
    target = OBJECTS[operation]
    for call in (target.run, target.get_impl()):
        assert_close(call(*named.values(), **sharding), run(operation, named))
    with pytest.raises(TypeError, match=r"page_attention: mesh given, expected none: use it inside jax\.shard_map"):
        OBJECTS["page_attention"].run(*arguments("page_attention").values(), mesh=two_devices())


@needs_devices
def test_axes_that_cannot_be_shared_out_are_refused() -> None:
    named = arguments("ragged_decode_attention")
    four, rows = Mesh(np.asarray(jax.devices()[:4]), ("x",)), PartitionSpec("x")
    expected = r"query has shape \(2, 4, 16\), expected a multiple of 4 along axis 0, which 'x' shards"
    with pytest.raises(ValueError, match=expected):
        run("ragged_decode_attention", named, mesh=four, in_specs=(rows,) * 5, out_specs=rows)


@needs_devices
@pytest.mark.parametrize("operation", PAGED)
def test_users_shard_map(operation: str) -> None:
    """Inside a caller's own `shard_map` over KV heads, with its checks of varying axes."""
    named = arguments(operation)
    layouts = {"page_attention": "PHTD", "prefill_page_attention": "HPTD", "unified_attention": "PTHD"}
    cache = PartitionSpec(*("heads" if axis == "H" else None for axis in layouts[operation]))
    rows = PartitionSpec(None, "heads")
    specs = {name: PartitionSpec() for name in named} | {
        "key_cache": cache,
        "value_cache": cache,
        next(iter(named)): rows,
    }
    sharded = jax.shard_map(lambda named: run(operation, named), mesh=mesh(2), in_specs=(specs,), out_specs=rows)
    assert_close(sharded(named), run(operation, named))


@pytest.mark.parametrize("operation", SHARDED)
@pytest.mark.parametrize(
    ("place", "spec", "pattern"),
    [
        (0, PartitionSpec(None, None, "x"), "query shards axis D, expected only batch or heads"),
        (1, PartitionSpec(), r"key.* shards the (heads|batch) over \(\), expected \('x',\) as in in_specs of query"),
        (2, PartitionSpec("y"), r"names \['y'\], expected axes of the mesh"),
        (3, PartitionSpec(None, None), r"is P\(None, None\), expected at most 1 entries"),
        (4, "x", "is 'x', expected a PartitionSpec"),
    ],
)
def test_specs_that_would_be_wrong_are_refused(operation: str, place: int, spec: Any, pattern: str) -> None:
    specs = list(SHARDED[operation])
    specs[place] = spec
    with pytest.raises((ValueError, TypeError), match=pattern):
        run(operation, arguments(operation), mesh=two_devices(), in_specs=specs, out_specs=OUT[operation])


@pytest.mark.parametrize("operation", SHARDED)
def test_incomplete_sharding_is_refused(operation: str) -> None:
    named = arguments(operation)
    with pytest.raises(TypeError, match=rf"{operation}: mesh is None, in_specs is .*expected a Mesh with both specs"):
        run(operation, named, in_specs=SHARDED[operation])
    with pytest.raises(ValueError, match=rf"{operation}: in_specs has 2 entries, expected 5: query"):
        run(operation, named, mesh=two_devices(), in_specs=SHARDED[operation][:2], out_specs=OUT[operation])
    specs = {"in_specs": SHARDED[operation], "out_specs": OUT[operation]}
    with pytest.raises(ValueError, match=rf"{operation}: out_specs is .*expected a pair of PartitionSpecs"):
        run(operation, named, mesh=two_devices(), return_lse=True, **specs)
