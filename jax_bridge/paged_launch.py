"""Launches of the paged Triton kernels: specialisations, grids and partial results."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_bridge import hopper_launch
from jax_bridge.device import Device
from jax_bridge.launch import Output, kernels, launch
from jax_bridge.layouts import cache_strides, scale_stride
from jax_bridge.tiles import (
    MAX_HEAD_DIM,
    build_tile,
    lacks_cache_dtype,
    max_registers,
    next_power_of_two,
    widest_head,
)
from jax_bridge.validation import PagedOptions, PagedSizes

Arrays = Mapping[str, Any]  # arrays by name, None where absent

_MAX_BLOCK_S = 1024  # segments that a program counts at once in its schedule
_FEW_BLOCK_S = 128  # where a single warp with few registers does
_MAX_REDUCE_ELEMENTS = 8192  # float32 partials that a reducing program holds: 64 registers a thread
_MOST_REDUCE_ELEMENTS = 2 * _MAX_REDUCE_ELEMENTS  # of a single row with many splits; more than that spills
_MIN_REDUCE_SPLITS = 8
_REDUCE_WARPS = 4
_PLAIN_OPERANDS = ("k_ptr", "v_ptr", "alibi_ptr", "qq_bias_ptr")  # of kernels without specialised warps
ANY_ROWS = 2**31 - 1


def lacks(sizes: PagedSizes, cache_dtype: Any) -> str | None:
    """Words for what the paged kernels cannot do on the current device, or None."""
    if (widest := max(sizes.head_dim, sizes.value_head_dim)) > MAX_HEAD_DIM:
        return f"head dims above {MAX_HEAD_DIM} (here {widest})"
    return lacks_cache_dtype(cache_dtype)


def operands_of(arrays: Arrays, *, query: str, lengths: str, table: str, starts: jax.Array | None) -> Arrays:
    """The arrays of a paged operation by the names of the kernel's parameters.

    Args:
        arrays: Arrays by the names of the operation's arguments, validated.
        query: What the operation calls its queries.
        lengths: What it calls its lengths.
        table: What it calls its page table.
        starts: First row of each sequence and the end of the last one; None for one row a sequence.
    """
    return {
        "q_ptr": arrays[query],
        "k_ptr": arrays["key_cache"],
        "v_ptr": arrays["value_cache"],
        "starts_ptr": starts,
        "lens_ptr": arrays[lengths],
        "table_ptr": arrays[table],
        "alibi_ptr": arrays["alibi_slopes"],
        "qq_bias_ptr": arrays.get("qq_bias"),
        "sink_ptr": arrays["attention_sink"],
        "k_scale_ptr": arrays["k_scale"],
        "v_scale_ptr": arrays["v_scale"],
    }


@dataclasses.dataclass(frozen=True)
class RowClass:
    """Sequences by their rows (tokens times query heads a KV head): their tile, and how programs share the work.

    Attributes:
        block_m: rows a tile.
        block_n: keys a tile.
        num_warps: warps a program.
        num_stages: depth of the software pipeline.
        skip_masks: whether tiles whose keys every row sees leave out the mask.
        programs_per_sm: programs a streaming multiprocessor that the balanced schedule reckons with.
        min_tiles: tiles of keys below which a sequence is not divided further.
        num_splits: pieces that the keys of every row tile are divided into; 0 lets the kernel balance the batch.
        fewest_rows: rows of the shortest sequences that belong here.
        most_rows: rows of the longest ones.
        shares_per_program: shares that programs take one after another from a counter; 0 gives each program one share
            and needs no counter.
        warp_specialized: whether the kernel for Hopper takes them.
        even_splits: whether sequences are divided by themselves, evenly; else the batch is, wherever the cuts fall.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    skip_masks: bool
    programs_per_sm: int
    min_tiles: int
    num_splits: int = 0
    fewest_rows: int = 1
    most_rows: int = ANY_ROWS
    shares_per_program: int = 0
    warp_specialized: bool = False
    even_splits: bool = False


@dataclasses.dataclass(frozen=True)
class Work:
    """What bounds the work of a class of sequences, whatever the lengths are.

    Attributes:
        row_tiles: tiles of rows.
        key_tiles: tiles of keys that a row tile spans.
        splits: splits of a row tile.
        is_forced: whether every row tile has so many, or fewer if it has fewer KV tiles.
        shares: shares of all row tiles.
        programs: programs a KV head that do them.
        even_shares: shares of the whole batch that even splits are about as long as, or 0.
    """

    row_tiles: int
    key_tiles: int
    splits: int
    is_forced: bool
    shares: int
    programs: int
    even_shares: int = 0

    @property
    def cut_row_tiles(self) -> int:
        """Row tiles that may be cut: evenly, only those of half as many tiles again as an equal share of the batch."""
        return min(self.row_tiles, 2 * self.even_shares // 3) if self.even_shares else self.row_tiles

    @property
    def partials(self) -> int:
        """Partial results a KV head."""
        if self.splits == 1:
            return 0
        return self.shares if self.is_forced or self.even_shares else 2 * self.shares


def work_bounds(rows: RowClass, sizes: PagedSizes, is_packed: bool, longest: int, device: Device) -> Work:
    """Bounds on the work of the sequences in `rows` that see up to `longest` keys from one row tile."""
    group, total_rows = sizes.group_size, sizes.num_tokens * sizes.group_size
    segments = min(sizes.num_seqs + 2 if is_packed else sizes.num_seqs, total_rows // max(rows.fewest_rows, group))
    most_rows = min(rows.most_rows, total_rows if is_packed else group)
    row_tiles = min(total_rows // rows.block_m + segments, segments * math.ceil(most_rows / rows.block_m))
    key_tiles = max(1, math.ceil(longest / rows.block_n))
    programs = max(1, device.num_sms * rows.programs_per_sm // sizes.num_kv_heads)
    even_shares = 0
    programs_or_tickets = programs * max(1, rows.shares_per_program)
    if is_forced := rows.num_splits > 0 or key_tiles <= rows.min_tiles:
        splits = min(max(1, rows.num_splits), key_tiles)
        shares = row_tiles * splits
    elif rows.even_splits:
        # A split is about as long as an even share of the batch, in which each row tile of this class counts at least
        # once: so its own row tiles make up no more than the whole, and a single share cuts none.
        even_shares = programs_or_tickets
        splits = min(even_shares + 1, key_tiles // rows.min_tiles + 1) if even_shares > 1 else 1
        shares = min(even_shares + row_tiles, row_tiles * splits)
    else:
        shares = max(1, min(programs_or_tickets, row_tiles * math.ceil((key_tiles + 1) / rows.min_tiles)))
        splits = min(key_tiles, shares)
    if row_tiles == 0:  # all tokens together have too few rows to belong here
        splits = 1
    return Work(
        row_tiles=row_tiles,
        key_tiles=key_tiles,
        splits=splits,
        is_forced=is_forced,
        shares=shares,
        programs=min(shares, programs) if rows.shares_per_program else shares,
        even_shares=even_shares,
    )


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """A kernel, what it takes beside the constants of every kernel, and how it is launched."""

    function: Any
    operands: Arrays
    constants: Mapping[str, Any]
    tickets: Arrays
    num_programs: int
    num_warps: int
    max_registers: int | None


def _few_and_many(parts: Sequence[tuple[Any, Any]]) -> dict[str, Any]:
    """Tiles and schedules of sequences of few rows, None where there is one schedule, and of many."""
    few, many = parts if len(parts) == 2 else ((None, None), parts[0])
    return dict(zip(("FEW_TILE", "FEW_SCHEDULE", "MANY_TILE", "MANY_SCHEDULE"), (*few, *many), strict=True))


@dataclasses.dataclass(frozen=True)
class PagedCall:
    """A call of a paged operation, ready to be launched.

    Attributes:
        operation: Its name, for profiles and errors.
        operands: Arrays by the names of the kernel's parameters, validated; `starts_ptr` None is a token a sequence.
        sizes: Their sizes. At least one token must be there.
        options: Static arguments of the operation.
        device: The GPU to launch for.
        is_causal: Whether rows see no later keys where the options have no window.
        max_keys: A bound on the lengths below that of the page table.
        begins: First key of each sequence, int32 `[S]`; needs a token a sequence. None lets all begin at 0.
    """

    operation: str
    operands: Arrays
    sizes: PagedSizes
    options: PagedOptions
    device: Device
    is_causal: bool = True
    max_keys: int | None = None
    begins: jax.Array | None = None

    def attend(self, classes: Sequence[RowClass]) -> tuple[jax.Array, jax.Array | None]:
        """Launches paged attention, and the reduction if keys may be split.

        Args:
            classes: One that holds every sequence, or one of few rows and one of many.

        Returns:
            The output `[T, Hq, Dv]`, and the LSE `[T, Hq]` or None.
        """
        parts: list[tuple[Any, Any, Work]] = []
        partial_rows = 0
        for rows in classes:
            work = work_bounds(rows, self.sizes, self._is_packed, self._longest_span(rows), self.device)
            schedule = self._schedule(
                rows, work, first_partial=math.ceil(partial_rows / (rows.block_m * self.sizes.num_kv_heads))
            )
            parts.append((self._tile(rows), schedule, work))
            if work.splits > 1:
                partial_rows = (schedule.first_partial + work.partials) * self.sizes.num_kv_heads * rows.block_m
        constants = self._constants()
        answers = self._answers()
        partials = {
            "partial_out_ptr": Output((partial_rows, self.sizes.value_head_dim), jnp.float32),
            "partial_lse_ptr": Output((partial_rows,), jnp.float32),
        }
        num_programs = sum(schedule.num_slots for _, schedule, _ in parts) * self.sizes.num_kv_heads
        if classes[0].warp_specialized:
            prepare = self._specialized
        else:
            prepare = self._plain if len(classes) == 1 else self._mixed
        kernel = prepare(classes, [(tile, schedule) for tile, schedule, _ in parts], num_programs)
        results = launch(
            kernel.function,
            outputs=answers | (partials if partial_rows else dict.fromkeys(partials)),
            operands=kernel.operands,
            updated=kernel.tickets,
            constants={**constants, **kernel.constants},
            num_programs=kernel.num_programs,
            num_warps=kernel.num_warps,
            num_stages=max(rows.num_stages for rows in classes),
            device=self.device,
            operation=self.operation,
            max_registers=kernel.max_registers,
        )
        if split := [part for part in parts if part[-1].splits > 1]:
            results |= self._reduce(split, constants, results)
        return results["out_ptr"], results.get("lse_ptr")

    def _plain(self, classes: Sequence[RowClass], parts: Sequence[tuple[Any, Any]], num_programs: int) -> _Kernel:
        """The kernel that takes all sequences by one schedule."""
        ((tile, schedule),) = parts
        return _Kernel(
            kernels("paged_attention").paged_attention_kernel,
            operands={**self.operands, "begins_ptr": self.begins},
            constants={"TILE": tile, "SCHEDULE": schedule},
            tickets={"ticket_ptr": None},
            num_programs=num_programs,
            num_warps=classes[0].num_warps,
            max_registers=self._max_registers(classes, classes[0].num_warps),
        )

    def _mixed(self, classes: Sequence[RowClass], parts: Sequence[tuple[Any, Any]], num_programs: int) -> _Kernel:
        """The kernel with different programs for few rows and for many."""
        takes_tickets = classes[0].shares_per_program > 0
        if takes_tickets:  # programs for few rows come first and last
            num_programs += parts[0][1].num_slots * self.sizes.num_kv_heads
        num_warps = max(rows.num_warps for rows in classes)
        return _Kernel(
            kernels("paged_attention").mixed_paged_attention_kernel,
            operands=self.operands,
            constants=_few_and_many(parts),
            tickets={"ticket_ptr": jnp.zeros(1, jnp.int32) if takes_tickets else None},
            num_programs=num_programs,
            num_warps=num_warps,
            max_registers=self._max_registers(classes, num_warps),
        )

    def _specialized(self, classes: Sequence[RowClass], parts: Sequence[tuple[Any, Any]], num_programs: int) -> _Kernel:
        """The kernel for Hopper, whose programs take turns, or tickets of both kinds."""
        operands = {name: array for name, array in self.operands.items() if name not in _PLAIN_OPERANDS}
        return _Kernel(
            kernels("hopper_attention").hopper_paged_attention_kernel,
            operands=operands
            | hopper_launch.cache_descriptors(
                self.operands["k_ptr"], self.operands["v_ptr"], self.options.kv_layout, classes[0].block_n
            ),
            constants=_few_and_many(parts),
            tickets={"tickets_ptr": jnp.zeros(3, jnp.int32) if len(classes) == 2 else None},
            num_programs=min(num_programs, self.device.num_sms * classes[0].programs_per_sm),
            num_warps=hopper_launch.WARPS,
            max_registers=None,  # each kind of warps has its own
        )

    def _reduce(
        self,
        split: Sequence[tuple[Any, Any, Work]],
        constants: Mapping[str, Any],
        results: Mapping[str, jax.Array],
    ) -> dict[str, jax.Array]:
        """Merges the partial results of all classes of rows that have some into the output."""
        reductions = []
        for tile, schedule, work in split:
            block_rows, block_splits = reduce_blocks(work, self.sizes, tile, self.device)
            num_programs = work.cut_row_tiles * self.sizes.num_kv_heads * (tile.block_m // block_rows)
            reductions.append(
                kernels("specialization").Reduction(tile, schedule, block_rows, block_splits, num_programs)
            )
        first, second = (*reductions, None)[:2]
        return launch(
            kernels("split_reduce").split_reduce_kernel,
            outputs={},
            operands={
                **{name: self.operands[name] for name in ("starts_ptr", "lens_ptr", "sink_ptr", "v_scale_ptr")},
                "begins_ptr": self.begins,
                "partial_out_ptr": results["partial_out_ptr"],
                "partial_lse_ptr": results["partial_lse_ptr"],
                "is_cut_ptr": results.get("tickets_ptr"),
            },
            updated={"out_ptr": results["out_ptr"], "lse_ptr": results.get("lse_ptr")},
            constants={
                **{name: constants[name] for name in ("QUERIES", "CACHE", "SCORING", "V_SCALE_STRIDE")},
                "FIRST": first,
                "SECOND": second,
            },
            num_programs=sum(reduction.num_programs for reduction in reductions),
            num_warps=_REDUCE_WARPS,
            num_stages=1,
            device=self.device,
            operation=self.operation,
        )

    def _max_registers(self, classes: Sequence[RowClass], num_warps: int) -> int | None:
        """Registers a thread with which all programs planned for fit a multiprocessor; None for no limit."""
        decodes = not any(rows.skip_masks for rows in classes)
        caps_exactly = self.options.soft_cap is not None and self.operands["q_ptr"].dtype == jnp.float32
        is_plain = not caps_exactly and self.operands["alibi_ptr"] is None
        programs_per_sm = max(rows.programs_per_sm for rows in classes)
        return max_registers(num_warps, programs_per_sm, widest_head(self.sizes), is_plain=is_plain or not decodes)

    @property
    def _is_packed(self) -> bool:
        return self.operands["starts_ptr"] is not None

    @property
    def _num_segments(self) -> int:
        return self.sizes.num_seqs + 2 if self._is_packed else self.sizes.num_seqs

    @property
    def _longest(self) -> int:
        """Keys of the longest sequence that the page table and the caller's bound allow."""
        capacity = min(self.sizes.table_width * self.sizes.page_size, kernels("schedule").LONGEST)
        capacity = capacity if self.sizes.num_pages else 0
        return capacity if self.max_keys is None else min(capacity, self.max_keys)

    @property
    def _window(self) -> tuple[int | None, int | None]:
        return self.options.window or (None, 0 if self.is_causal else None)

    def _longest_span(self, rows: RowClass) -> int:
        """Keys from the first tile to the last one that the rows of one row tile see."""
        left, right = self._window
        if left is None or right is None:
            return self._longest
        tokens = (rows.block_m - 1) // self.sizes.group_size + 2 if self._is_packed else 1
        return min(self._longest, left + right + tokens + rows.block_n)

    def _answers(self) -> dict[str, Output | None]:
        rows = (self.sizes.num_tokens, self.sizes.num_q_heads)
        return {
            "out_ptr": Output((*rows, self.sizes.value_head_dim), self.operands["q_ptr"].dtype),
            "lse_ptr": Output(rows, jnp.float32) if self.options.return_lse else None,
        }

    def _tile(self, rows: RowClass) -> Any:
        return build_tile(
            self.operation,
            block_m=rows.block_m,
            block_n=rows.block_n,
            head_dim=self.sizes.head_dim,
            value_head_dim=self.sizes.value_head_dim,
            num_stages=rows.num_stages,
            skip_masks=rows.skip_masks,
            itemsize=self.operands["k_ptr"].dtype.itemsize,
            device=self.device,
        )

    def _schedule(self, rows: RowClass, work: Work, first_partial: int) -> Any:
        return kernels("specialization").Schedule(
            fewest_rows=rows.fewest_rows,
            most_rows=rows.most_rows,
            max_keys=self._longest,
            num_splits=work.splits if work.is_forced else 0,
            num_shares=work.shares,
            num_slots=work.programs,
            min_tiles=rows.min_tiles,
            most_tiles=work.key_tiles,
            block_s=min(_FEW_BLOCK_S if rows.warp_specialized else _MAX_BLOCK_S, next_power_of_two(self._num_segments)),
            most_work=self._most_work(rows, work),
            first_partial=first_partial,
            even_splits=self._even_splits(rows, work),
        )

    def _even_splits(self, rows: RowClass, work: Work) -> Any:
        """How row tiles are cut by themselves, or None: alike in all classes, so that splits are about as long."""
        if work.even_shares == 0:
            return None
        has_single_tiles = rows.most_rows <= rows.block_m
        counted_rows = hopper_launch.TILE_ROWS if has_single_tiles else min(rows.block_m, hopper_launch.TILE_ROWS)
        return kernels("specialization").EvenSplits(work.even_shares, counted_rows)

    def _most_work(self, rows: RowClass, work: Work) -> int:
        """Tiles or splits of all row tiles at most, though every segment may claim every token."""
        tokens = self.sizes.num_tokens if self._is_packed else 1
        row_tiles = self._num_segments * math.ceil(tokens * self.sizes.group_size / rows.block_m)
        work_each = work.splits if work.is_forced else work.key_tiles + rows.min_tiles
        return (row_tiles + work.shares) * work_each

    def _constants(self) -> dict[str, Any]:
        """What every kernel of the call is specialised for."""
        specialization, operands, options = kernels("specialization"), self.operands, self.options
        left, right = self._window
        return {
            "QUERIES": specialization.Queries(
                num_seqs=self.sizes.num_seqs,
                num_segments=self._num_segments,
                num_tokens=self.sizes.num_tokens,
                num_q_heads=self.sizes.num_q_heads,
                num_kv_heads=self.sizes.num_kv_heads,
                group_size=self.sizes.group_size,
            ),
            "CACHE": _paged_cache(self.sizes, options.kv_layout, operands["k_ptr"].shape, operands["v_ptr"].shape),
            "SCORING": specialization.Scoring(
                softmax_scale=options.softmax_scale,
                soft_cap=options.soft_cap,
                window_left=left,
                window_right=right,
                qq_size=0 if operands["qq_bias_ptr"] is None else operands["qq_bias_ptr"].shape[0],
                scale_is_folded=options.soft_cap is None
                and all(operands[name] is None for name in ("alibi_ptr", "qq_bias_ptr", "k_scale_ptr"))
                and options.softmax_scale > 0,
            ),
            "K_SCALE_STRIDE": scale_stride(operands["k_scale_ptr"]),
            "V_SCALE_STRIDE": scale_stride(operands["v_scale_ptr"]),
        }


def reduce_blocks(work: Work, sizes: PagedSizes, tile: Any, device: Device) -> tuple[int, int]:
    """Rows and splits that one program of the reduction holds at once.

    A batch of equal lengths has `shares / row_tiles` splits a row tile; twice as many are loaded in one go, and some
    more for the one long sequence among short ones. The rows of a token are taken together where a row tile has room
    for several and often holds one; more where the programs would otherwise be too many for the SMs. Where there is
    room, many of these find no row to merge: of such more are worth having than of those that do.
    """
    has_room = tile.block_m > 2 * sizes.group_size
    rows_each, programs_per_sm = (tile.block_m, 16) if has_room else (sizes.group_size, 4)
    expected_splits = max(_MIN_REDUCE_SPLITS, 2 * work.shares // work.row_tiles)
    block_splits = min(64, _MOST_REDUCE_ELEMENTS // tile.block_dv, next_power_of_two(min(work.splits, expected_splits)))
    fitting = max(1, _MAX_REDUCE_ELEMENTS // (tile.block_dv * block_splits))
    num_rows = work.cut_row_tiles * sizes.num_kv_heads * rows_each
    for_occupancy = max(1, num_rows // (programs_per_sm * device.num_sms))
    of_a_token = next_power_of_two(sizes.group_size) if has_room else 1
    rows = min(fitting, max(for_occupancy, of_a_token), tile.block_m)
    return 1 << rows.bit_length() - 1, block_splits


def _paged_cache(sizes: PagedSizes, kv_layout: str, key_shape: tuple[int, ...], value_shape: tuple[int, ...]) -> Any:
    """`triton_kernels.specialization.PagedCache` of a pair of caches."""
    k_strides, v_strides = cache_strides(kv_layout, key_shape), cache_strides(kv_layout, value_shape)
    return kernels("specialization").PagedCache(
        num_pages=sizes.num_pages,
        page_size=sizes.page_size,
        table_width=sizes.table_width,
        head_dim=sizes.head_dim,
        value_head_dim=sizes.value_head_dim,
        k_page_stride=k_strides.page,
        k_token_stride=k_strides.token,
        k_head_stride=k_strides.head,
        v_page_stride=v_strides.page,
        v_token_stride=v_strides.token,
        v_head_stride=v_strides.head,
    )
