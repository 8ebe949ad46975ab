"""`write_kv_pages` and `merge_attention_states` on every platform: rounding, places, what is updated in place."""

from __future__ import annotations

import functools
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jax_bridge
from tests import oracle
from tests.cache_problems import MergeCase, WriteCase, bits, check_rounding, merge_cases, write_cases, written
from tests.cases import QUANTISED
from tests.implementations import CACHE_PLATFORMS, MARKS
from tests.poison import numpy_dtype

pytestmark = [*MARKS, pytest.mark.usefixtures("small_device")]
each_platform = pytest.mark.parametrize("platform", CACHE_PLATFORMS)


@each_platform
@given(case=write_cases(), seed=st.integers(0, 2**32 - 1))
def test_any_write_matches_the_oracle(platform: str, case: WriteCase, seed: int) -> None:
    case.check(platform, seed)


@each_platform
@given(case=merge_cases(), seed=st.integers(0, 2**32 - 1))
def test_any_merge_matches_the_oracle(platform: str, case: MergeCase, seed: int) -> None:
    case.check(platform, seed)


@each_platform
@pytest.mark.parametrize("cache_dtype", QUANTISED)
def test_eight_bits_are_rounded_to_the_nearest_even(platform: str, cache_dtype: str) -> None:
    check_rounding(platform, cache_dtype)


@each_platform
@pytest.mark.parametrize("cache_dtype", ["float32", "float16", "bfloat16", *QUANTISED])
def test_infinities_saturate_where_anything_is_converted(platform: str, cache_dtype: str) -> None:
    """NaN stays NaN, 0 in integers. Without conversion and scale, bits are copied."""
    if cache_dtype == "int8":
        limits = [127.0, -128.0, 0.0]
    else:
        info = ml_dtypes.finfo(numpy_dtype(cache_dtype))
        limits = [float(info.max), float(info.min), np.nan]
    for dtype, scale in itertools.product(("float32", "float16", "bfloat16"), (None, 1.0)):
        tokens = np.asarray([np.inf, -np.inf, np.nan], numpy_dtype(dtype))
        got = written(tokens, cache_dtype, k_scale=scale, platform=platform)
        expected = [np.inf, -np.inf, np.nan] if scale is None and dtype == cache_dtype else limits
        np.testing.assert_array_equal(got.astype(np.float64), expected, f"{dtype} with scale {scale}")


@each_platform
@pytest.mark.parametrize("cache_dtype", QUANTISED)
def test_quotients_are_rounded_before_they_are_stored(platform: str, cache_dtype: str) -> None:
    """As divisions: a product with the reciprocal may miss a middle between two values that the quotient hits."""
    tokens = np.arange(-64, 65, dtype=np.float32) / 32
    for scale in (0.02, 0.03, 0.7):
        quotients = tokens / np.float32(scale)
        expected = [oracle.nearest(quotient, numpy_dtype(cache_dtype)) for quotient in quotients]
        got = written(tokens, cache_dtype, k_scale=scale, platform=platform)
        np.testing.assert_array_equal(got.astype(np.float64), expected, f"scale {scale}")


@each_platform
def test_16_bits_are_rounded_once(platform: str) -> None:
    tokens = np.float32([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20, 65519, 65520, 1e6, -(2.0**-25)])
    for cache_dtype in ("bfloat16", "float16"):
        dtype = numpy_dtype(cache_dtype)
        largest = float(ml_dtypes.finfo(dtype).max)
        expected = np.clip(tokens, -largest, largest).astype(dtype)
        np.testing.assert_array_equal(bits(written(tokens, cache_dtype, platform=platform)), bits(expected))


@each_platform
def test_nothing_to_write(platform: str) -> None:
    caches = jnp.ones((3, 4, 2, 16)), jnp.full((3, 4, 2, 8), 2.0)
    nothing = jnp.zeros((0, 2, 16)), jnp.zeros((0, 2, 8))
    for got, cache in zip(
        jax_bridge.write_kv_pages(*nothing, *caches, jnp.zeros(0, jnp.int32), platform=platform), caches, strict=True
    ):
        np.testing.assert_array_equal(got, cache)
    tokens = jnp.ones((2, 2, 16)), jnp.ones((2, 2, 8))
    empty = tuple(cache[:0] for cache in caches)
    got, _ = jax_bridge.write_kv_pages(*tokens, *empty, jnp.arange(2), platform=platform)
    assert got.shape == (0, 4, 2, 16)


SHAPES = {"PTHD": (64, 16, 2, 64), "PHTD": (64, 2, 16, 64), "HPTD": (2, 64, 16, 64)}


def step(platform: str | None, kv_layout: str = "PTHD") -> Any:
    """A jitted write that is given the caches."""
    write = functools.partial(jax_bridge.write_kv_pages, kv_layout=kv_layout, platform=platform)
    return jax.jit(write, donate_argnums=(2, 3))


def fresh(dtype: Any, kv_layout: str = "PTHD") -> tuple[jax.Array, jax.Array]:
    return jnp.zeros(SHAPES[kv_layout], dtype), jnp.ones(SHAPES[kv_layout], dtype)


def copies_of(compiled: Any, shape: tuple[int, ...]) -> list[str]:
    """Lines of an optimised program that copy an array of some shape."""
    text = ",".join(map(str, shape))
    return [line for line in compiled.as_text().splitlines() if re.search(rf"\[{text}\]\S* copy(-start)?\(", line)]


@pytest.mark.parametrize("kv_layout", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_the_compiled_program_holds_no_copy_of_a_donated_cache(dtype: str, kv_layout: str) -> None:
    """Of `"auto"`: the kernel on a GPU, `xla` on a CPU."""
    caches, tokens, slots = fresh(dtype, kv_layout), jnp.ones((4, 2, 64)), jnp.arange(4)
    compiled = step(None, kv_layout).lower(tokens, tokens, *caches, slots).compile()
    assert not copies_of(compiled, caches[0].shape)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == 2 * caches[0].nbytes
    assert memory.temp_size_in_bytes < caches[0].nbytes / 4
    kept = jax.jit(functools.partial(jax_bridge.write_kv_pages, kv_layout=kv_layout))
    program = kept.lower(tokens, tokens, *caches, slots).compile()
    assert program.memory_analysis().alias_size_in_bytes == 0
    assert len(copies_of(program, caches[0].shape)) == 2


@each_platform
def test_caches_that_are_not_donated_stay_as_they_are(platform: str) -> None:
    """In one program with a reader of the old cache, too."""
    caches = fresh("float32")
    tokens, slots = jnp.full((4, 2, 64), 5.0), jnp.array([3, -1, 70, 1])

    @jax.jit
    def write_and_read(*caches: jax.Array) -> Any:
        new = jax_bridge.write_kv_pages(tokens, tokens, *caches, slots, platform=platform)
        return new, caches[0].sum(), caches[1].sum()

    for new, before, after in (
        write_and_read(*caches),
        (jax_bridge.write_kv_pages(tokens, tokens, *caches, slots, platform=platform), 0.0, caches[1].size),
    ):
        assert (float(before), float(after)) == (0.0, caches[1].size)
        for cache, old in zip(new, (0.0, 1.0), strict=True):
            expected = np.full(SHAPES["PTHD"], old)
            expected.reshape(-1, 2, 64)[[3, 70, 1]] = 5.0
            np.testing.assert_array_equal(cache, expected)
    np.testing.assert_array_equal(caches[0], np.zeros(SHAPES["PTHD"]))
    np.testing.assert_array_equal(caches[1], np.ones(SHAPES["PTHD"]))


@each_platform
def test_writes_follow_each_other_in_a_scan(platform: str) -> None:
    """As the layers and the steps of a model do, in one buffer; a step reads what the one before wrote."""

    def layer(caches: tuple[jax.Array, jax.Array], index: jax.Array) -> Any:
        tokens = jnp.full((1, 2, 64), index + 1, jnp.float32) + caches[0].reshape(-1, 2, 64)[index]
        slots = (index + 1)[None]
        return jax_bridge.write_kv_pages(tokens, tokens, *caches, slots, platform=platform), None

    run = jax.jit(lambda *caches: jax.lax.scan(layer, caches, jnp.arange(5))[0], donate_argnums=(0, 1))
    key_cache, _ = run(*fresh("float32"))
    np.testing.assert_array_equal(key_cache.reshape(-1, 2, 64)[:7, 0, 0], [0, 1, 3, 6, 10, 15, 0])


@pytest.mark.gpu
def test_memory_stays_constant_over_donated_steps() -> None:
    device = jax.devices()[0]
    write = step("triton")
    caches = jnp.zeros((4096, 16, 8, 128), jnp.bfloat16), jnp.zeros((4096, 16, 8, 128), jnp.bfloat16)
    tokens = jnp.ones((64, 8, 128), jnp.bfloat16)
    pointers = [cache.unsafe_buffer_pointer() for cache in caches]
    slots = [jnp.arange(64) + 64 * index for index in range(100)]
    caches = write(tokens, tokens, *caches, slots[0])
    before, peak = (device.memory_stats()[name] for name in ("bytes_in_use", "peak_bytes_in_use"))
    for places in slots:
        caches = write(tokens, tokens, *caches, places)
        assert [cache.unsafe_buffer_pointer() for cache in caches] == pointers
    after = jax.block_until_ready(caches)[0].addressable_data(0).device.memory_stats()
    assert after["bytes_in_use"] == before
    assert after["peak_bytes_in_use"] - peak < caches[0].nbytes / 4
    assert float(caches[0].sum(dtype=jnp.float32)) == 100 * tokens.size


@pytest.mark.parametrize("operation", ["write_kv_pages", "merge_attention_states"])
def test_kernels_refuse_gradients(operation: str) -> None:
    rows, lses, caches = jnp.ones((2, 2, 16)), jnp.zeros((2, 2)), jnp.ones((3, 4, 2, 16))
    arrays = (rows, rows, caches, caches, jnp.arange(2)) if operation == "write_kv_pages" else (rows, lses, rows, lses)
    call = functools.partial(getattr(jax_bridge, operation), platform="triton")
    with pytest.raises(NotImplementedError, match=rf"{operation}\[triton\] does not support differentiation"):
        jax.grad(lambda first: call(first, *arrays[1:])[0].sum())(arrays[0])
