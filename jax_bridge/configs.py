"""Launch configurations: how an operation runs, never what it computes.

A field that is None is chosen by the heuristics of the platform. Configurations are frozen and hashable, since they are
part of the key under which a compiled program is kept.
"""

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

PLATFORMS = ("triton", "pallas", "xla", "cuda", "auto")
BACKENDS = ("any", "cpu", "gpu", "tpu")


def _power_of_two(value: int) -> bool:
    return value >= 1 and value & (value - 1) == 0


_DOT_BLOCK_RULE = (lambda value: _power_of_two(value) and value >= 16, "a power of two from 16")
_STAGES_RULE = (lambda value: 1 <= value <= 32, "an integer from 1 to 32")
_RULES: dict[str, tuple[Callable[[int], bool], str]] = {
    "num_warps": (lambda value: _power_of_two(value) and value <= 32, "a power of two from 1 to 32"),
    "num_stages": _STAGES_RULE,
    "num_splits": (lambda value: value >= 0, "an integer >= 0"),
    "num_key_splits": (lambda value: value >= 1, "an integer >= 1"),
    "num_par_softmax_segments": (lambda value: value >= 1, "an integer >= 1"),
    "seq_threshold_3d": (lambda value: value >= 0, "an integer >= 0"),
    "decode_num_stages": _STAGES_RULE,
    "decode_programs_per_sm": (lambda value: value >= 1, "an integer >= 1"),
    "programs_per_sm": (lambda value: value >= 1, "an integer >= 1"),
    "min_tiles_per_split": (lambda value: value >= 1, "an integer >= 1"),
    "kv_blocksize": _DOT_BLOCK_RULE,
    "kv_heads_at_once": (lambda value: value >= 1, "an integer >= 1"),
    "block_q": _DOT_BLOCK_RULE,
    "block_n": _DOT_BLOCK_RULE,
    "decode_block_n": _DOT_BLOCK_RULE,
    "block_k": _DOT_BLOCK_RULE,
}
_BLOCK_RULE = (_power_of_two, "a power of two")
_FLAGS = ("skip_masks", "warp_specialized")
SPECIALIZED_ROWS = 128
"""Rows of a tile of programs with specialised warps."""
DECODE_TILE_FIELDS = ("decode_block_n", "decode_num_stages", "decode_programs_per_sm")
"""What decode tiles have for themselves in programs without specialised warps."""


class Config:
    """What every configuration shares: the platform, the backend and the checks of the fields.

    Attributes:
        platform: the platform to run on; `"auto"` leaves the choice to the call.
        backend: the hardware that the configuration is meant for; `"any"` for all.
    """

    platform: str
    backend: str

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if field.name == "platform":
                self._check_choice(field.name, value, PLATFORMS)
            elif field.name == "backend":
                self._check_choice(field.name, value, BACKENDS)
            elif field.name in _FLAGS:
                if value is not None and not isinstance(value, bool):
                    raise TypeError(f"{type(self).__name__}: {field.name} is {value!r}, expected a bool")
            elif field.name == "fwd_params":
                if value is not None and not isinstance(value, FwdParams):
                    raise TypeError(f"{type(self).__name__}: fwd_params is {value!r}, expected FwdParams or None")
            elif value is not None:
                checked = self._checked(field.name, value)
                is_open = field.name == "num_splits" and checked == 0  # as in the call
                object.__setattr__(self, field.name, None if is_open else checked)

    @property
    def is_open(self) -> bool:
        """Whether everything but the platform and the backend is left to be chosen."""
        names = (field.name for field in dataclasses.fields(self))  # type: ignore[arg-type]
        values = (getattr(self, name) for name in names if name not in ("platform", "backend"))
        return all(value is None or (isinstance(value, Config) and value.is_open) for value in values)

    def _check_choice(self, name: str, value: Any, choices: tuple[str, ...]) -> None:
        if value not in choices:
            raise ValueError(f"{type(self).__name__}: {name} is {value!r}, expected one of {', '.join(choices)}")

    def _checked(self, name: str, value: Any) -> int:
        accepts, expected = _RULES.get(name, _BLOCK_RULE)
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"{type(self).__name__}: {name} is {value!r}, expected {expected}")
        if not accepts(operator.index(value)):
            raise ValueError(f"{type(self).__name__}: {name} is {value!r}, expected {expected}")
        return operator.index(value)


def warp_specialization(cfg: Config) -> bool | None:
    """What `cfg` says about specialised warps, None for nothing: tiles that it fixes are those of programs without."""
    if not hasattr(cfg, "warp_specialized"):
        return None
    tile = ("block_m", "block_n", "num_warps", "num_stages", "programs_per_sm", "skip_masks")
    if cfg.warp_specialized is not None:
        return bool(cfg.warp_specialized)
    is_fixed = any(getattr(cfg, name, None) is not None for name in (*tile, *DECODE_TILE_FIELDS))
    return False if is_fixed or (getattr(cfg, "decode_block_m", None) or 0) > SPECIALIZED_ROWS else None


def chosen(value: int | None) -> int:
    """A field that heuristics have filled in."""
    if value is None:
        raise TypeError("a configuration has open fields, expected every field to be chosen")
    return value


def completed(cfg: Any, defaults: Any) -> Any:
    """`cfg` with the fields that it leaves open, also in configurations inside it, taken from `defaults`.

    What the fields that it fixes say about specialised warps comes before what `defaults` say.
    """
    changes = {}
    for field in dataclasses.fields(cfg):
        value, default = getattr(cfg, field.name), getattr(defaults, field.name)
        if field.name == "warp_specialized":
            value = warp_specialization(cfg)
            changes[field.name] = default if value is None else value
        elif value is None:
            changes[field.name] = default
        elif isinstance(value, Config):
            changes[field.name] = completed(value, default)
    return dataclasses.replace(cfg, **changes) if changes else cfg


@dataclasses.dataclass(frozen=True)
class PageAttentionConfig(Config):
    """How `page_attention` runs.

    Attributes:
        num_splits: pieces that each sequence's keys are divided into; 1 writes the output directly, 0 is None.
        num_warps: warps a program.
        num_stages: depth of the software pipeline.
        platform: see `Config`.
        backend: see `Config`.
        block_m: query rows a tile.
        block_n: keys a tile.
        programs_per_sm: programs a streaming multiprocessor that the number of splits aims at.
        min_tiles_per_split: tiles of keys below which a sequence is not divided further.
        skip_masks: whether tiles whose keys every row sees leave out the mask.
    """

    num_splits: int | None = None
    num_warps: int | None = None
    num_stages: int | None = None
    platform: str = "auto"
    backend: str = "any"
    block_m: int | None = None
    block_n: int | None = None
    programs_per_sm: int | None = None
    min_tiles_per_split: int | None = None
    skip_masks: bool | None = None


@dataclasses.dataclass(frozen=True)
class PrefillPageAttentionConfig(Config):
    """How `prefill_page_attention` runs; fields as in `PageAttentionConfig`.

    Attributes:
        warp_specialized: see `UnifiedAttentionConfig`; `num_warps` then counts those that compute.
    """

    num_warps: int | None = None
    num_stages: int | None = None
    platform: str = "auto"
    backend: str = "any"
    num_splits: int | None = None
    block_m: int | None = None
    block_n: int | None = None
    programs_per_sm: int | None = None
    min_tiles_per_split: int | None = None
    skip_masks: bool | None = None
    warp_specialized: bool | None = None


@dataclasses.dataclass(frozen=True)
class UnifiedAttentionConfig(Config):
    """How `unified_attention` runs.

    Sequences whose rows (tokens times query heads a KV head) fit a decode tile are divided among programs of one kind,
    longer ones among programs of another kind in the same launch. Programs with specialised warps do both.

    Attributes:
        seq_threshold_3d: number of sequences up to which keys are divided; 0 never does.
        num_par_softmax_segments: pieces that each sequence's keys are divided into; chosen from the lengths if None.
        num_warps: warps a program.
        num_stages: depth of the software pipeline over prefill tiles.
        platform: see `Config`.
        backend: see `Config`.
        block_m: query rows a prefill tile.
        block_n: keys a prefill tile.
        programs_per_sm: prefill programs a streaming multiprocessor.
        skip_masks: whether prefill tiles whose keys every row sees leave out the mask.
        decode_block_m: query rows a decode tile, and of the longest sequences that are decoding.
        decode_block_n: keys a decode tile; None with specialised warps, whose tiles are all alike.
        decode_num_stages: depth of the software pipeline over decode tiles, likewise.
        decode_programs_per_sm: decode programs a streaming multiprocessor, likewise.
        min_tiles_per_split: decode tiles of keys below which a sequence is not divided further.
        warp_specialized: whether programs have specialised warps, which Hopper has, unless all sequences are decoding.
            They take tiles of 128 rows, `num_stages` is how many tiles of K and of V are in shared memory, `num_warps`
            counts those that compute. If None, fixing one of `block_m`, `block_n`, `num_warps`, `num_stages`,
            `programs_per_sm`, `skip_masks` and the decode tile's fields means False; `decode_block_m` only above 128.
    """

    seq_threshold_3d: int | None = None
    num_par_softmax_segments: int | None = None
    num_warps: int | None = None
    num_stages: int | None = None
    platform: str = "auto"
    backend: str = "any"
    block_m: int | None = None
    block_n: int | None = None
    programs_per_sm: int | None = None
    skip_masks: bool | None = None
    decode_block_m: int | None = None
    decode_block_n: int | None = None
    decode_num_stages: int | None = None
    decode_programs_per_sm: int | None = None
    min_tiles_per_split: int | None = None
    warp_specialized: bool | None = None


@dataclasses.dataclass(frozen=True)
class FwdParams(Config):
    """Launch parameters of the forward pass of `ragged_decode_attention`.

    Attributes:
        blocksize_heads: query heads a tile on `triton`: rows that read the keys of their KV head together. Fewer than
            share a KV head read them several times; more leave rows empty.
        num_key_splits: pieces that the visible keys of each row are divided into on `triton`, at most one a tile of
            keys; if None, balanced over the batch from its ranges.
        kv_blocksize: keys a tile.
        num_warps: warps a program on `triton`.
        num_stages: depth of the software pipeline on `triton`.
        skip_masks: whether tiles whose keys every head sees leave out the mask on `triton`.
    """

    blocksize_heads: int | None = None
    num_key_splits: int | None = None
    kv_blocksize: int | None = None
    num_warps: int | None = None
    num_stages: int | None = None
    skip_masks: bool | None = None


@dataclasses.dataclass(frozen=True)
class RaggedDecodeAttentionConfig(Config):
    """How `ragged_decode_attention` runs.

    Attributes:
        fwd_params: launch parameters.
        platform: see `Config`.
        backend: see `Config`.
    """

    fwd_params: FwdParams | None = None
    platform: str = "auto"
    backend: str = "any"


@dataclasses.dataclass(frozen=True)
class AttentionConfig(Config):
    """How `attention` runs.

    Attributes:
        block_q: rows a tile: query tokens times the query heads that share a KV head.
        block_k: keys a tile.
        num_warps: warps a program.
        num_stages: depth of the software pipeline.
        platform: see `Config`.
        backend: see `Config`.
        programs_per_sm: programs a streaming multiprocessor that the registers must suffice for.
        skip_masks: whether tiles whose keys every row sees leave out the mask.
        kv_heads_at_once: KV heads whose row tiles run side by side; their keys should fit the L2 cache.
    """

    block_q: int | None = None
    block_k: int | None = None
    num_warps: int | None = None
    num_stages: int | None = None
    platform: str = "auto"
    backend: str = "any"
    programs_per_sm: int | None = None
    skip_masks: bool | None = None
    kv_heads_at_once: int | None = None


@dataclasses.dataclass(frozen=True)
class CacheConfig(Config):
    """How `write_kv_pages` and `merge_attention_states` run: the platform only."""

    platform: str = "auto"
    backend: str = "any"
