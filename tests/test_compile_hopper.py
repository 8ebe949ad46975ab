"""The kernel with specialised warps, compiled for Hopper on a host without a GPU; which calls take it, and how."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from triton.backends.compiler import GPUTarget

import jax_bridge
from bench.machine_code import Binary, compile_launch, launches_of
from jax_bridge import PrefillPageAttentionConfig, UnifiedAttentionConfig, explain, hopper_launch, launch, paged_launch
from jax_bridge.device import KNOWN_DEVICES, target_device
from jax_bridge.layouts import CacheSizes, cache_shape
from jax_bridge.tiles import padded_head_dim
from jax_bridge.validation import PagedSizes

pytestmark = pytest.mark.compile

HOPPER = GPUTarget("cuda", 90, 32)
MOST_SPILLED_BYTES = 160  # of the warp that fetches, whose loops wait anyway
BOUNDED = {"logits_soft_cap": 30.0}
SIDE_BYTES = 2 << 10  # of shared memory beside queries, keys and values


@pytest.fixture(autouse=True)
def hopper() -> Iterator[None]:
    with target_device("h100"):
        yield


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Shapes of a call of `unified_attention`."""

    num_tokens: int = 4096
    num_seqs: int = 1
    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    value_head_dim: int | None = None
    page_size: int = 16
    num_pages: int = 1 << 12
    kv_layout: str = "PTHD"
    dtype: Any = jnp.bfloat16
    cache_dtype: Any = None
    alibi: bool = False
    qq_bias: bool = False
    sinks: bool = False

    @property
    def arrays(self) -> list[Any]:
        array, index = jax.ShapeDtypeStruct, functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
        sizes = CacheSizes(self.num_pages, self.page_size, self.num_kv_heads, self.head_dim)
        values = sizes._replace(head_dim=self.value_head_dim or self.head_dim)
        stored = self.cache_dtype or self.dtype
        return [
            array((self.num_tokens, self.num_q_heads, self.head_dim), self.dtype),
            *(array(cache_shape(self.kv_layout, each), stored) for each in (sizes, values)),
            index((self.num_seqs,)),
            index((self.num_seqs, 512)),
            index((self.num_seqs + 1,)),
        ]

    @property
    def keywords(self) -> dict[str, Any]:
        heads = jax.ShapeDtypeStruct((self.num_q_heads,), jnp.float32)
        named = {
            "alibi_slopes": heads if self.alibi else None,
            "qq_bias": jax.ShapeDtypeStruct((8, 8), jnp.float32) if self.qq_bias else None,
            "attention_sink": heads if self.sinks else None,
        }
        return {name: array for name, array in named.items() if array is not None} | {"kv_layout": self.kv_layout}

    def cfg(self, cfg: UnifiedAttentionConfig | None = None) -> Any:
        """The complete configuration of the call."""
        return explain("unified_attention", *self.arrays, **self.keywords, platform="triton", cfg=cfg).cfg

    def binary(self, cfg: UnifiedAttentionConfig | None = None, **options: Any) -> Binary:
        """The kernel that takes the prompts."""
        keywords = self.keywords | options | {"platform": "triton", "cfg": cfg}
        launches = launches_of(jax_bridge.unified_attention, *self.arrays, modules=(paged_launch,), **keywords)
        (prompts,) = (each for each in launches if each.kernel.__name__ == "hopper_paged_attention_kernel")
        return compile_launch(prompts, HOPPER)


SERVED = {
    "llama": Prompts(),
    "mixed": Prompts(num_tokens=2080, num_seqs=33),
    "split": Prompts(num_tokens=128),
    "d64": Prompts(head_dim=64, dtype=jnp.float16),
    "d80": Prompts(head_dim=80),
    "d96_no_groups": Prompts(head_dim=96, num_kv_heads=32),
    "d192": Prompts(head_dim=192, num_q_heads=16, kv_layout="PHTD"),
    "d256": Prompts(head_dim=256, num_q_heads=16),
    "page_8": Prompts(page_size=8),
    "many_sequences": Prompts(num_tokens=16384, num_seqs=1022, num_q_heads=64),
    "line_of_64_bits": Prompts(num_tokens=2112, num_seqs=128, num_q_heads=16, num_kv_heads=8, page_size=1024),
    "page_256": Prompts(page_size=256, kv_layout="PHTD"),
    "heads_outside": Prompts(kv_layout="HPTD", sinks=True),
}


@pytest.mark.parametrize("name", SERVED)
def test_prompts(name: str) -> None:
    prompts = SERVED[name]
    cfg = prompts.cfg()
    assert cfg.warp_specialized
    binary = prompts.binary()
    assert binary.wgmma > 0
    assert binary.tma > 0
    assert binary.stack <= MOST_SPILLED_BYTES
    tiles = cfg.block_m + 2 * cfg.num_stages * cfg.block_n
    assert "WARPSYNC" not in binary.sass, "ptxas thinks that threads of the warp that fetches may part"
    # What Triton's own passes would add for layouts of stores does not fit beside wide heads.
    tile_bytes = tiles * padded_head_dim(prompts.head_dim) * 2
    assert tile_bytes <= binary.shared <= tile_bytes + SIDE_BYTES


@pytest.mark.parametrize(
    "options",
    [
        {"sliding_window": 1024},
        {"sliding_window": (64, 8), "causal": False},
        {"logits_soft_cap": 30.0},
        {"logits_soft_cap": 30.0, "sliding_window": 1024, "return_lse": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("num_seqs", [1, 33])
def test_features(num_seqs: int, options: dict[str, Any]) -> None:
    binary = Prompts(sinks=True, num_seqs=num_seqs).binary(**{"return_lse": True} | options)
    assert binary.tma > 0
    assert binary.stack <= MOST_SPILLED_BYTES
    assert "WARPSYNC" not in binary.sass
    assert binary.shared <= KNOWN_DEVICES["h100"].shared_memory


@pytest.mark.parametrize("options", [{}, BOUNDED], ids=str)
def test_products_are_not_waited_for_one_by_one(options: dict[str, Any]) -> None:
    """Every loop over tiles waits twice: for the scores, and for what is accumulated."""
    binary = Prompts().binary(**options)
    assert binary.wgmma >= 8 * binary.wgmma_waits


def test_weights_are_not_packed_anew_for_every_product() -> None:
    """A loop that carries them as 16-bit numbers has 32 more instructions, one that masks 64: twice, 192 together.

    Finished rows take the others.
    """
    finishing, loops = 262, 192
    assert Prompts().binary().sass.count("PRMT") < finishing + loops // 4


@pytest.mark.parametrize("block_n", [16, 32, 64, 128, 256])
def test_bounded_logits_with_tiles_of_other_sizes(block_n: int) -> None:
    cfg = UnifiedAttentionConfig(warp_specialized=True, block_n=block_n, num_stages=1)
    assert Prompts().binary(cfg, **BOUNDED).wgmma > 0


@pytest.mark.parametrize(
    ("options", "is_bounded"),
    [
        ({"logits_soft_cap": 50.0}, True),
        ({"logits_soft_cap": 60.0}, False),
        ({"logits_soft_cap": 50.0, "return_lse": True}, False),
    ],
    ids=str,
)
def test_logits_under_a_small_soft_cap_need_no_maximum(options: dict[str, Any], is_bounded: bool) -> None:
    maxima = Prompts().binary(**options).sass.count("FMNMX")
    assert maxima < 64 if is_bounded else maxima > 256


@pytest.mark.parametrize("options", [{}, BOUNDED], ids=str)
@pytest.mark.parametrize("name", ["llama", "mixed"])
def test_a_warpgroup_is_complete_when_it_arrives_at_a_barrier(name: str, options: dict[str, Any]) -> None:
    """One thread arrives for all. A warp that lagged behind would find a phase of the same parity, two turns later.

    The emulator cannot show it: there a warpgroup is one thread.
    """
    computing, fetching, _ = SERVED[name].binary(**options).sass.partition("UTMALDG")
    assert fetching
    arrival = "SYNCS.ARRIVE.TRANS64.A1T0"  # of bytes that are expected there is no A1T0
    events = re.findall(rf"BAR\.SYNC|{re.escape(arrival)}", computing)
    assert events.count(arrival) > 20
    assert all(before == "BAR.SYNC" for before, event in itertools.pairwise(events) if event == arrival)


def test_bridge_and_kernel_agree_on_where_caches_end() -> None:
    """Boxes that nobody needs are fetched from there."""
    beyond = launch.kernels("hopper_fetching").MOST_CACHE_ROWS.value
    arrays = {**dict.fromkeys(("alibi_slopes", "qq_bias")), "queries": jnp.zeros(1, jnp.bfloat16)}
    arrays["key_cache"] = arrays["queries"]
    sizes = PagedSizes(1, 512, 8, 8, 1, 128, 128, num_pages=beyond // 128, page_size=16, table_width=1)
    assert hopper_launch.lacks(arrays, sizes, KNOWN_DEVICES["h100"]) is None
    one_more = dataclasses.replace(sizes, num_pages=sizes.num_pages + 1)
    assert "caches of more than" in str(hopper_launch.lacks(arrays, one_more, KNOWN_DEVICES["h100"]))


NOT_SERVED = {
    "alibi_slopes": Prompts(alibi=True),
    "qq_bias": Prompts(qq_bias=True),
    "float32 queries": Prompts(dtype=jnp.float32),
    "int8 caches": Prompts(cache_dtype=jnp.int8),
    "heads 84 and 84 wide": Prompts(head_dim=84),
    "heads 32 and 32 wide": Prompts(head_dim=32),
    "heads 264 and 264 wide": Prompts(head_dim=264),
    "heads 128 and 64 wide": Prompts(value_head_dim=64),
    "pages of 20 tokens": Prompts(page_size=20),
    "pages of 4 tokens": Prompts(page_size=4),
    "caches of more than": Prompts(num_pages=1 << 24),
}


@pytest.mark.parametrize("words", NOT_SERVED)
def test_others_take_the_other_kernel_and_refuse_to_be_asked(words: str) -> None:
    prompts = NOT_SERVED[words]
    assert prompts.cfg().warp_specialized is False
    with pytest.raises(NotImplementedError, match=rf"unified_attention\[triton\] with warp_specialized=True .*{words}"):
        prompts.binary(UnifiedAttentionConfig(warp_specialized=True))


@pytest.mark.parametrize("chip", [name for name, chip in KNOWN_DEVICES.items() if not chip.specializes_warps])
def test_other_devices_take_the_other_kernel(chip: str) -> None:
    with target_device(chip):
        assert Prompts().cfg().warp_specialized is False
        with pytest.raises(NotImplementedError, match=r"compute capability 9\.0"):
            Prompts().binary(UnifiedAttentionConfig(warp_specialized=True))


@pytest.mark.parametrize(("num_tokens", "num_seqs"), [(64, 64), (256, 64), (63, 1), (128, 2), (511, 64)])
def test_calls_of_few_rows_take_the_other_kernel(num_tokens: int, num_seqs: int) -> None:
    assert Prompts(num_tokens=num_tokens, num_seqs=num_seqs).cfg().warp_specialized is False


@pytest.mark.parametrize(("num_tokens", "num_seqs"), [(3, 2), (5, 2), (20, 2), (2, 0), (16, 0), (600, 0)])
@pytest.mark.parametrize("fields", [{"warp_specialized": True}, {"num_par_softmax_segments": 3}], ids=str)
def test_small_batches_that_ask_for_it(num_tokens: int, num_seqs: int, fields: dict[str, Any]) -> None:
    """Where no sequence can have many rows, or there is none, as with any other kernel."""
    prompts = Prompts(num_tokens=num_tokens, num_seqs=num_seqs, num_q_heads=8, num_kv_heads=8)
    call = functools.partial(jax_bridge.unified_attention, kv_layout="PTHD", platform="triton")
    launches = launches_of(call, *prompts.arrays, modules=(paged_launch,), cfg=UnifiedAttentionConfig(**fields))
    assert launches


@pytest.mark.parametrize(
    "fields",
    [
        {"block_m": 64},
        {"block_n": 32},
        {"num_warps": 4},
        {"num_stages": 2},
        {"programs_per_sm": 1},
        {"decode_block_n": 64},
        {"decode_num_stages": 3},
        {"decode_programs_per_sm": 2},
        {"decode_block_m": 256},
    ],
    ids=str,
)
def test_tiles_that_are_fixed_are_those_of_the_other_kernel(fields: dict[str, int]) -> None:
    cfg = Prompts().cfg(UnifiedAttentionConfig(**fields))
    plain = Prompts().cfg(UnifiedAttentionConfig(warp_specialized=False))
    assert cfg == dataclasses.replace(plain, **fields)


def test_where_all_is_decoding_it_has_no_part() -> None:
    """Then a configuration that asks for it chooses as others do, and may fix the tiles that are taken."""
    decodes = Prompts(num_tokens=64, num_seqs=64)
    fields: dict[str, Any] = {"block_m": 64, "decode_block_n": 32, "decode_block_m": 256, "skip_masks": False}
    cfg = UnifiedAttentionConfig(warp_specialized=True, **fields)
    plain = decodes.cfg(UnifiedAttentionConfig(**fields))
    assert decodes.cfg(cfg) == dataclasses.replace(plain, warp_specialized=True)
    launches = launches_of(
        jax_bridge.unified_attention, *decodes.arrays, modules=(paged_launch,), platform="triton", cfg=cfg,
        **decodes.keywords,
    )  # fmt: skip
    assert [each.kernel.__name__ for each in launches] == ["paged_attention_kernel", "split_reduce_kernel"]


def test_what_explain_says_can_be_asked_for() -> None:
    cfg = Prompts().cfg()
    assert Prompts().cfg(cfg) == cfg
    assert Prompts().binary(cfg).tma > 0


@pytest.mark.parametrize(
    "fields",
    [
        {"block_m": 64},
        {"skip_masks": False},
        {"num_warps": 4},
        {"decode_block_n": 128},
        {"decode_num_stages": 2},
        {"decode_programs_per_sm": 1},
        {"decode_block_m": 256},
    ],
    ids=str,
)
def test_tiles_that_it_has_not_are_refused(fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.raises(ValueError, match=rf"unified_attention: cfg.{name} is {fields[name]}, expected"):
        Prompts().binary(UnifiedAttentionConfig(warp_specialized=True, **fields))


def test_longer_tiles_than_a_product_takes_are_refused() -> None:
    cfg = UnifiedAttentionConfig(warp_specialized=True, block_n=512, num_stages=1)
    with pytest.raises(ValueError, match=r"unified_attention: cfg\.block_n is 512, expected at most 256"):
        Prompts(head_dim=64).binary(cfg)


def test_explain_raises_what_the_call_raises() -> None:
    with pytest.raises(NotImplementedError, match="alibi_slopes"):
        Prompts(alibi=True).cfg(UnifiedAttentionConfig(warp_specialized=True))
    with pytest.raises(ValueError, match="block_m is 64"):
        Prompts().cfg(UnifiedAttentionConfig(warp_specialized=True, block_m=64))


def test_auto_takes_another_platform_for_what_it_lacks() -> None:
    prompts = Prompts(alibi=True)
    traced, cfg = {"alibi_slopes": prompts.keywords["alibi_slopes"]}, UnifiedAttentionConfig(warp_specialized=True)

    def call(arrays: Any, traced: Any) -> Any:
        return jax_bridge.unified_attention(*arrays, **traced, kv_layout="PTHD", cfg=cfg)

    lowered = jax.jit(call).trace(prompts.arrays, traced).lower(lowering_platforms=("cuda",)).as_text()
    assert "triton_kernel_call" not in lowered


def test_warps_of_a_chunk_are_those_that_compute() -> None:
    chunk = Prompts(num_tokens=512).arrays[:3]
    scalars = [jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((512,), jnp.int32)]
    chosen: Any = explain("prefill_page_attention", *chunk, *scalars, kv_layout="PTHD", platform="triton").cfg
    assert (chosen.warp_specialized, chosen.num_warps) == (True, 8)
    cfg = PrefillPageAttentionConfig(warp_specialized=True, num_warps=4)
    with pytest.raises(ValueError, match=r"prefill_page_attention: cfg\.num_warps is 4, expected 8"):
        jax.eval_shape(
            functools.partial(jax_bridge.prefill_page_attention, kv_layout="PTHD", platform="triton", cfg=cfg),
            *chunk,
            *scalars,
        )


def test_it_is_launched_with_all_its_warps(monkeypatch: pytest.MonkeyPatch) -> None:
    """jax-triton asks for those that there are before some are specialised: the launch would fail."""
    warps: dict[str, int] = {}
    library = launch._jax_triton().triton_lib.triton_kernel_call_lib

    class Recording:
        def __getattr__(self, name: str) -> Any:
            return getattr(library._library, name)

        def TritonKernel(self, name: str, num_warps: int, *rest: Any) -> Any:
            warps[name] = num_warps
            return library._library.TritonKernel(name, num_warps, *rest)

    monkeypatch.setattr(launch._jax_triton().triton_lib, "triton_kernel_call_lib", launch._CheckedLibrary(Recording()))
    prompts = Prompts(num_tokens=2080, num_seqs=33)
    call = functools.partial(jax_bridge.unified_attention, **prompts.keywords, platform="triton")
    jax.jit(call).trace(*prompts.arrays).lower(lowering_platforms=("cuda",))
    assert warps["hopper_paged_attention_kernel"] == 12
    assert warps["split_reduce_kernel"] == 4


@pytest.fixture
def asked_anew() -> Iterator[None]:
    """Whether Gluon is there is asked again, also behind the test."""
    launch.lacks_gluon.cache_clear()
    yield
    launch.lacks_gluon.cache_clear()


@pytest.mark.usefixtures("asked_anew")
def test_older_versions_of_triton_take_the_other_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_triton_version", lambda: (3, 8))
    assert launch.lacks_gluon() == "Triton before 3.9"
    assert Prompts(num_tokens=1234).cfg().warp_specialized is False


@pytest.mark.usefixtures("asked_anew")
def test_a_jaxlib_that_describes_no_arrays_to_the_tma_takes_the_other_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch._jax_triton().triton_lib, "triton_kernel_call_lib", object())
    assert launch.lacks_gluon() == "jaxlib before 0.11.1"
    assert Prompts(num_tokens=1235).cfg().warp_specialized is False


@pytest.mark.usefixtures("asked_anew")
def test_without_triton_heuristics_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Any:
        raise ImportError

    monkeypatch.setattr(launch, "_jax_triton", fail)
    assert Prompts(num_tokens=1236).cfg().warp_specialized is False
