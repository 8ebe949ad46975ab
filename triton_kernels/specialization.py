"""What kernels are compiled for, one constexpr each: sizes and strides of a cache, score function, tiles, schedule."""

from dataclasses import dataclass


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
    """What a call asks of the scores. A row at position `i` sees keys from `i - window_left` on; None is unbounded."""

    softmax_scale: float
    soft_cap: float | None = None
    window_left: int | None = None
    scale_is_folded: bool = True
    """Whether `softmax_scale * log2(e)` is all that lies between dot products and base-2 logits, and is positive."""


@dataclass(frozen=True)
class Tile:
    """Rows (`block_m`), keys (`block_n`) and padded head dims of a tile.

    `bulk_loop` runs the tiles that need no mask in a loop of their own.
    """

    block_m: int
    block_n: int
    block_d: int
    block_dv: int
    num_stages: int
    bulk_loop: bool = True


@dataclass(frozen=True)
class Schedule:
    """How the KV tiles of a batch are cut into splits.

    `num_splits` is forced, or 0 to balance the batch: `capacity` work items run at once, each costs `program_cost`
    tiles beyond its own, and none is cut below `min_tiles`. Programs count `block_s` sequences at a time.
    """

    num_seqs: int
    max_keys: int
    num_splits: int
    capacity: int
    min_tiles: int
    block_s: int
    program_cost: int = 4
