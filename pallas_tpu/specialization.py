"""What a kernel is compiled for: sizes, score function, blocks. Frozen, as a program is kept by it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Scoring:
    """What a call asks of the scores.

    A row at position `i` sees the keys from `i - window_left` to `i + window_right`; None is unbounded.
    """

    softmax_scale: float
    soft_cap: float | None = None
    window_left: int | None = None
    window_right: int | None = 0
    has_alibi: bool = False
    has_sinks: bool = False
    qq_size: int | None = None
    """Rows and columns of the bias between the new tokens of a sequence."""


@dataclass(frozen=True)
class Pages:
    """Caches of pages, `[P, ps, Hkv, D]` or whatever order of the letters P, T, H and D `layout` spells."""

    layout: str
    num_pages: int
    page_size: int
    table_width: int

    @property
    def tokens_first(self) -> bool:
        """Whether the tokens of a page come before its heads."""
        return self.layout.index("T") < self.layout.index("H")


@dataclass(frozen=True)
class DenseRows:
    """Dense keys `[B, L, Hkv, D]`, of which sequence `b` sees a range of row `b`."""

    length: int

    tokens_first = True


@dataclass(frozen=True)
class Split:
    """How the cores of a chip share a call.

    Attributes:
        num_cores: cores, 1 or 2.
        over_heads: whether each core takes some of the KV heads of all sequences, or all heads of some sequences.
        grid_blocks: blocks of keys a sequence, where each is a step of the grid; None where the kernel loops over them.
    """

    num_cores: int = 1
    over_heads: bool = False
    grid_blocks: int | None = None


@dataclass(frozen=True)
class Blocks:
    """How much a step of the kernel takes.

    Attributes:
        tokens: query tokens of a sequence with more than one.
        keys: keys; of paged caches a multiple of the page size.
        decodes: whether sequences of one token have a tile of their own, without room for more.
    """

    tokens: int
    keys: int
    decodes: bool = True


@dataclass(frozen=True)
class Specialization:
    """Everything static about a kernel.

    A segment is a run of query tokens: a sequence, or where sequences are packed the padding before and after all of
    them. `num_kv_heads` are those of one core.
    """

    num_segments: int
    is_packed: bool
    num_kv_heads: int
    group_size: int
    head_dim: int
    value_head_dim: int
    source: Pages | DenseRows
    scoring: Scoring
    blocks: Blocks
    split: Split = Split()
    return_lse: bool = False

    @property
    def num_q_heads(self) -> int:
        """Query heads of one core."""
        return self.num_kv_heads * self.group_size

    @property
    def tiles(self) -> tuple[int, ...]:
        """Tokens of each kind of tile, in ascending order."""
        return (1, self.blocks.tokens) if self.blocks.decodes and self.blocks.tokens > 1 else (self.blocks.tokens,)
