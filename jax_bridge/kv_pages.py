"""Writing new keys and values into the pages of a cache."""

import dataclasses
from typing import Any

import jax

import reference
from jax_bridge.configs import CacheConfig
from jax_bridge.device import Device
from jax_bridge.operation import Implementation, Invocation, Operation, Outputs
from jax_bridge.validation import FLOAT, Arguments


@dataclasses.dataclass(frozen=True)
class WriteOptions:
    """Static arguments of `write_kv_pages`."""

    kv_layout: str


@dataclasses.dataclass(frozen=True)
class WriteSizes:
    """Sizes of one call, named as in `PagedSizes`."""

    num_tokens: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int
    num_pages: int
    page_size: int


def _xla(invocation: Invocation, cfg: CacheConfig, device: Device | None) -> Outputs:
    del cfg, device
    arrays = invocation.arrays
    return reference.write_kv_pages(
        arrays["key"],
        arrays["value"],
        arrays["key_cache"],
        arrays["value_cache"],
        arrays["slot_mapping"],
        k_scale=arrays["k_scale"],
        v_scale=arrays["v_scale"],
        kv_layout=invocation.options.kv_layout,
    )


class WriteKVPages(Operation):
    """The operation object of `write_kv_pages`."""

    name = "write_kv_pages"
    config_type = CacheConfig
    implementations = (Implementation("xla", _xla),)

    def invocation(
        self,
        key: Any,
        value: Any,
        key_cache: Any,
        value_cache: Any,
        slot_mapping: Any,
        /,
        *,
        k_scale: Any = None,
        v_scale: Any = None,
        kv_layout: str = "PTHD",
    ) -> Invocation:
        """Check the arguments of `write_kv_pages`."""
        check = Arguments(self.name)
        layout = check.layout(kv_layout)
        check.array("key", key, ("T", "Hkv", "D"), FLOAT)
        check.array("value", value, ("T", "Hkv", "Dv"), FLOAT)
        check.caches(key_cache, value_cache, layout, same_width=False)
        arrays = {
            "key": key,
            "value": value,
            "key_cache": key_cache,
            "value_cache": value_cache,
            "slot_mapping": check.index("slot_mapping", slot_mapping, ("T",)),
            "k_scale": check.kv_scale("k_scale", k_scale),
            "v_scale": check.kv_scale("v_scale", v_scale),
        }
        sizes = check.sizes
        written = WriteSizes(
            num_tokens=sizes["T"],
            num_kv_heads=sizes["Hkv"],
            head_dim=sizes["D"],
            value_head_dim=sizes["Dv"],
            num_pages=sizes["P"],
            page_size=sizes["ps"],
        )
        return Invocation(self.name, arrays, WriteOptions(layout), written)

    @staticmethod
    def outputs(invocation: Invocation) -> Any:
        """Both caches."""
        caches = (invocation.arrays["key_cache"], invocation.arrays["value_cache"])
        return tuple(jax.ShapeDtypeStruct(cache.shape, cache.dtype) for cache in caches)


_OPERATION = WriteKVPages()


def write_kv_pages(
    key: jax.Array,
    value: jax.Array,
    key_cache: jax.Array,
    value_cache: jax.Array,
    slot_mapping: jax.Array,
    /,
    *,
    k_scale: jax.Array | float | None = None,
    v_scale: jax.Array | float | None = None,
    kv_layout: str = "PTHD",
    platform: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Write new keys and values into their slots; in place where the caches are donated to a jitted caller.

    Args:
        key: `[T, Hkv, D]`, float32, float16 or bfloat16.
        value: `[T, Hkv, Dv]`, likewise.
        key_cache: `[P, ps, Hkv, D]` in the default layout; any float of the keys, float8_e4m3fn, float8_e5m2 or int8.
        value_cache: `[P, ps, Hkv, Dv]`, with the dtype of `key_cache`.
        slot_mapping: integers `[T]`, `page * ps + offset`; negative slots and slots beyond the cache are dropped.
        k_scale: keys are divided by it, rounded and saturated: a number, or an array `[1]` or `[Hkv]`.
        v_scale: likewise for values.
        kv_layout: order of the cache's axes page, token, head, dim: `"PTHD"`, `"PHTD"` or `"HPTD"`.
        platform: `"triton"`, `"xla"`, or `"auto"` (None).

    Returns:
        `(key_cache, value_cache)` with the tokens written.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or values that do not fit.
        NotImplementedError: the platform does not support the operation.
    """
    written: tuple[jax.Array, jax.Array] = _OPERATION.run(
        key,
        value,
        key_cache,
        value_cache,
        slot_mapping,
        k_scale=k_scale,
        v_scale=v_scale,
        kv_layout=kv_layout,
        platform=platform,
    )
    return written
