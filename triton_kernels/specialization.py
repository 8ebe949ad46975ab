"""What kernels are compiled for, one constexpr each: sizes and strides, score function, tiles, schedule."""

import math
from dataclasses import dataclass

import triton.language as tl

LARGEST_FAST_CAP = 1024.0
WEIGHT_BITS = 110.0  # of the 126 that float32 has below 1: the others are for values
LARGEST_BOUNDED_SPAN = 146.0  # of logits under a soft cap of 50, a little more


@dataclass(frozen=True)
class Queries:
    """The rows of a call: tokens packed by sequence, or one token a sequence.

    A segment is a run of tokens: a sequence, or where sequences are packed the padding before and after all of them.
    """

    num_seqs: int
    num_segments: int
    num_tokens: int
    num_q_heads: int
    num_kv_heads: int
    group_size: int


@dataclass(frozen=True)
class PagedCache:
    """K and V caches of one shape up to the head dim. Strides are in elements; the head dim is contiguous."""

    num_pages: int
    page_size: int
    table_width: int
    head_dim: int
    value_head_dim: int
    k_page_stride: int
    k_token_stride: int
    k_head_stride: int
    v_page_stride: int
    v_token_stride: int
    v_head_stride: int


@dataclass(frozen=True)
class Scoring:
    """What a call asks of the scores.

    A row at position `i` sees the keys from `i - window_left` to `i + window_right`; None is unbounded.
    """

    softmax_scale: float
    soft_cap: float | None = None
    window_left: int | None = None
    window_right: int | None = 0
    qq_size: int = 0
    """Rows and columns of the bias between the new tokens of a sequence."""
    scale_is_folded: bool = True
    """Whether `softmax_scale * log2(e)` is all that lies between dot products and base-2 logits, and is positive."""

    @property
    def has_fast_cap(self) -> bool:
        """Whether a soft cap is so small that its approximation is exact enough for 16 bits."""
        return self.soft_cap is not None and self.soft_cap <= LARGEST_FAST_CAP

    @property
    def cap_span(self) -> float:
        """Between the smallest and the largest base-2 logit under a soft cap, which there must be."""
        assert self.soft_cap is not None
        return 2 * self.soft_cap * math.log2(math.e)

    @property
    def log_cap_span(self) -> float:
        return math.log2(self.cap_span)

    @property
    def bounded_max(self) -> float | None:
        """What may stand for the maximum of base-2 logits, counted from a soft cap, whatever they are.

        The smallest weight is then `2^-WEIGHT_BITS` or more, the largest `2^36` or less: float32, bfloat16 hold them,
        and float32 their sums and products with values of up to 1e22. None without a cap, or with one too large for it.
        """
        if self.soft_cap is None or self.cap_span > LARGEST_BOUNDED_SPAN:
            return None
        return min(0.0, WEIGHT_BITS - self.cap_span)


@dataclass(frozen=True)
class Tile:
    """Rows (`block_m`), keys (`block_n`) and padded head dims of a tile.

    `skip_masks` leaves out the mask of tiles whose keys every row sees, at the price of a branch.
    """

    block_m: int
    block_n: int
    block_d: int
    block_dv: int
    num_stages: int
    skip_masks: bool = True


@dataclass(frozen=True)
class EvenSplits:
    """Row tiles cut by themselves, about as long as each of `num_shares` equal shares of the whole batch.

    The batch is counted in tiles of `block_m` rows, whatever its schedules.
    """

    num_shares: int
    block_m: int


@dataclass(frozen=True)
class Schedule:
    """How the segments that have `fewest_rows` to `most_rows` rows are shared out.

    `num_splits` is forced, or 0 to balance the batch: over `num_shares` shares, none shorter than `min_tiles` KV tiles.
    If it is forced, or every row tile is cut into `even_splits`, there are `num_shares` at most. `num_slots` programs a
    KV head do a share each, or take them by tickets. A row tile spans `most_tiles` KV tiles at most, and to begin one
    costs as much as one of them.
    `most_work` bounds the tiles or splits of all row tiles, even where starts and lengths are nonsense.
    Programs count `block_s` segments at a time; their partial results begin at `first_partial`.
    """

    fewest_rows: int
    most_rows: int
    max_keys: int
    num_splits: int
    num_shares: int
    num_slots: int
    min_tiles: int
    most_tiles: int
    block_s: int
    most_work: int
    first_partial: int = 0
    even_splits: EvenSplits | None = None

    @property
    def is_balanced(self) -> bool:
        """Whether shares are of equal length, wherever they end."""
        return self.num_splits == 0 and self.even_splits is None

    @property
    def measure(self) -> tuple[EvenSplits | None, int, int, int]:
        """What the length of an even split depends on, beside the batch and the keys of a tile."""
        return self.even_splits, self.min_tiles, self.most_tiles, self.max_keys

    @property
    def unit(self) -> int:
        """Length of a KV tile on the line: balanced shares need not be of whole tiles."""
        return 16 if self.is_balanced else 1

    @property
    def line_type(self) -> tl.dtype:
        """The integers that positions on the line need: divisions of 64 bits take microseconds."""
        return tl.int32 if 2 * self.most_work * self.unit < 2**31 else tl.int64


@dataclass(frozen=True)
class Reduction:
    """What of a schedule's splits is merged how: `num_programs` programs, each of `block_rows` rows of a row tile.

    A program holds `block_splits` partial results of each row at once.
    """

    tile: Tile
    schedule: Schedule
    block_rows: int
    block_splits: int
    num_programs: int
