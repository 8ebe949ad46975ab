"""Writing new keys and values into the pages of a cache."""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

import reference
from jax_bridge.cache_heuristics import NUM_WARPS, WRITE_ELEMENTS, cache_config, columns_per_block, rows_per_program
from jax_bridge.configs import CacheConfig
from jax_bridge.device import Device
from jax_bridge.launch import available, kernel_operation, kernels, launch
from jax_bridge.layouts import cache_strides, scale_stride
from jax_bridge.operation import Implementation, Invocation, Operation, Outputs
from jax_bridge.paged_launch import Arrays
from jax_bridge.tiles import lacks_cache_dtype
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


def _triton(invocation: Invocation, cfg: CacheConfig, device: Device) -> Outputs:
    del cfg
    sizes, kv_layout = invocation.sizes, invocation.options.kv_layout
    if sizes.num_tokens == 0:
        return invocation.arrays["key_cache"], invocation.arrays["value_cache"]

    def write(arrays: Arrays) -> tuple[jax.Array, jax.Array]:
        return _launch(arrays, sizes, kv_layout, device)

    written: tuple[jax.Array, jax.Array] = kernel_operation("write_kv_pages[triton]", write)(dict(invocation.arrays))
    return written


def _launch(arrays: Arrays, sizes: WriteSizes, kv_layout: str, device: Device) -> tuple[jax.Array, jax.Array]:
    k_rows = _token_rows(arrays["key"], arrays["key_cache"], arrays["k_scale"], kv_layout)
    v_rows = _token_rows(arrays["value"], arrays["value_cache"], arrays["v_scale"], kv_layout)
    blocks = sum(math.ceil(rows.num_heads * rows.head_dim / rows.block_features) for rows in (k_rows, v_rows))
    widest = max(k_rows.block_features, v_rows.block_features)
    block_tokens = rows_per_program(sizes.num_tokens, widest, WRITE_ELEMENTS, device, blocks=blocks)
    results = launch(
        kernels("kv_pages").write_kv_pages_kernel,
        outputs={},
        operands={
            "key_ptr": arrays["key"],
            "value_ptr": arrays["value"],
            "slots_ptr": arrays["slot_mapping"],
            "k_scale_ptr": arrays["k_scale"],
            "v_scale_ptr": arrays["v_scale"],
        },
        updated={"key_cache_ptr": arrays["key_cache"], "value_cache_ptr": arrays["value_cache"]},
        constants={
            "NUM_TOKENS": sizes.num_tokens,
            "NUM_PAGES": sizes.num_pages,
            "PAGE_SIZE": sizes.page_size,
            "K_ROWS": k_rows,
            "V_ROWS": v_rows,
            "BLOCK_TOKENS": block_tokens,
        },
        num_programs=math.ceil(sizes.num_tokens / block_tokens) * blocks,
        num_warps=NUM_WARPS,
        num_stages=1,
        device=device,
        operation="write_kv_pages",
    )
    return results["key_cache_ptr"], results["value_cache_ptr"]


def _token_rows(tokens: jax.Array, cache: jax.Array, scale: jax.Array | None, kv_layout: str) -> Any:
    """`triton_kernels.kv_pages.TokenRows` of new tokens `[T, Hkv, D]` and their cache."""
    _, num_heads, head_dim = tokens.shape
    strides = cache_strides(kv_layout, cache.shape)
    return kernels("kv_pages").TokenRows(
        num_heads=num_heads,
        head_dim=head_dim,
        page_stride=strides.page,
        token_stride=strides.token,
        head_stride=strides.head,
        scale_stride=scale_stride(scale),
        block_features=columns_per_block(num_heads * head_dim),
        format=None if scale is None and tokens.dtype == cache.dtype else _stored_format(cache.dtype),
    )


def _stored_format(dtype: Any) -> Any:
    """`triton_kernels.kv_pages.StoredFormat` of a cache's dtype."""
    stored_format = kernels("kv_pages").StoredFormat
    if jnp.issubdtype(dtype, jnp.integer):
        limits = jnp.iinfo(dtype)
        # The steps of integers of n bits are those of floats with n - 1 bits behind the leading one, of the top binade.
        return stored_format(limits.min, limits.max, limits.bits - 1, 2.0 ** (limits.bits - 1))
    info = jnp.finfo(dtype)
    if info.bits > 8:  # converted from float32 as it should be, everywhere
        return stored_format(float(info.min), float(info.max))
    return stored_format(float(info.min), float(info.max), info.nmant, float(info.smallest_normal))


def _triton_lacks(invocation: Invocation) -> str | None:
    return lacks_cache_dtype(invocation.arrays["key_cache"].dtype)


class WriteKVPages(Operation):
    """The operation object of `write_kv_pages`."""

    name = "write_kv_pages"
    config_type = CacheConfig
    implementations: ClassVar[tuple[Implementation, ...]] = (
        Implementation("triton", _triton, lacks=_triton_lacks, heuristic_cfg=cache_config, is_available=available),
        Implementation("xla", _xla),
    )

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
        slot_mapping: integers `[T]`, `page * ps + offset`; negative slots and slots beyond the cache are dropped. No
            two tokens may have one slot: which of them stays there is not defined.
        k_scale: keys are divided by it, rounded to nearest and saturated: a number, or an array `[1]` or `[Hkv]`.
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
