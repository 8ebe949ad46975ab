"""Bugs that peers had, planted on purpose: the matrix has to fail for every one of them.

`WRONG_CALLS` turn a call into the one that a buggy implementation would really have computed; they wrap any
implementation. `WRONG_MATHEMATICS` are changes of the dense form, for bugs inside the computation.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from tests import dense_form
from tests.cases import Case, Window
from tests.dense_form import Result, Rounding, Sequence, exact, rounding_to
from tests.inputs import Call
from tests.poison import Array

WrongCall = Callable[[Call], Call]


def _widened(window: Window, by: int) -> Window:
    return (window[0] + by, window[1]) if isinstance(window, tuple) else window + by


def _with_window(call: Call, by: int) -> Call:
    assert call.case.window is not None
    window = _widened(call.case.window, by)
    return call.with_options(sliding_window=window)


def _with_cap(call: Call, cap: float | None) -> Call:
    name = "attn_logits_soft_cap" if "attn_logits_soft_cap" in call.options else "logits_soft_cap"
    return call.with_options(**{name: cap})


def _sinks_name(call: Call) -> str:
    return "softmax_aux" if "softmax_aux" in call.arrays else "attention_sink"


def _through_bfloat16(call: Call) -> Call:
    name = dense_form_query(call)
    return call.with_arrays(**{name: rounding_to("bfloat16")(call.array(name)).astype(np.float32)})


def dense_form_query(call: Call) -> str:
    """The name of the query argument."""
    return "queries" if call.operation == "unified_attention" else "query"


WRONG_CALLS: dict[str, tuple[Callable[[Case], bool], WrongCall]] = {
    "window_one_wider": (lambda case: case.window is not None, lambda call: _with_window(call, 1)),
    "window_one_narrower": (
        lambda case: case.window is not None and case.window != 1,
        lambda call: _with_window(call, -1),
    ),
    "window_ignored": (lambda case: case.window is not None, lambda call: call.with_options(sliding_window=None)),
    "cap_ignored": (lambda case: case.soft_cap is not None, lambda call: _with_cap(call, None)),
    "sinks_ignored": (lambda case: case.sinks > 0, lambda call: call.with_arrays(**{_sinks_name(call): None})),
    "sinks_scaled": (
        lambda case: case.sinks > 0,
        lambda call: call.with_arrays(
            **{_sinks_name(call): call.array(_sinks_name(call)) * np.float32(call.case.head_dim**-0.5)}
        ),
    ),
    "alibi_ignored": (lambda case: case.alibi, lambda call: call.with_arrays(alibi_slopes=None)),
    "alibi_mirrored": (
        lambda case: case.alibi,
        lambda call: call.with_arrays(alibi_slopes=-call.array("alibi_slopes")),
    ),
    "qq_bias_ignored": (lambda case: case.qq_bias > 0, lambda call: call.with_arrays(qq_bias=None)),
    "qq_bias_transposed": (
        lambda case: case.qq_bias > 0,
        lambda call: call.with_arrays(qq_bias=np.ascontiguousarray(call.array("qq_bias").T)),
    ),
    "bias_ignored": (lambda case: case.bias is not None, lambda call: call.with_arrays(bias=None)),
    "mask_ignored": (
        lambda case: case.mask != "none",
        lambda call: call.with_arrays(mask=None, q_segment_ids=None, kv_segment_ids=None, key_lengths=None),
    ),
    "k_scale_dropped": (lambda case: case.kv_scale != "none", lambda call: call.with_arrays(k_scale=None)),
    "v_scale_dropped": (lambda case: case.kv_scale != "none", lambda call: call.with_arrays(v_scale=None)),
    "v_scale_of_wrong_head": (
        lambda case: case.kv_scale == "head" and case.num_kv_heads > 1,
        lambda call: call.with_arrays(v_scale=np.roll(call.array("v_scale"), 1)),
    ),
    "scales_swapped": (
        lambda case: case.kv_scale != "none",
        lambda call: call.with_arrays(k_scale=call.array("v_scale"), v_scale=call.array("k_scale")),
    ),
    "through_bfloat16": (lambda case: case.dtype == "float32", _through_bfloat16),
    "scale_of_padded_head_dim": (
        lambda case: case.softmax_scale is None and case.head_dim in (72, 80, 96),
        lambda call: call.with_options(
            **{
                "attn_scale" if call.operation == "page_attention" else "softmax_scale": float(
                    2 ** np.ceil(np.log2(call.case.head_dim))
                )
                ** -0.5
            }
        ),
    ),
}
"""By name: which cases show the bug, and the call that a buggy implementation computes."""


def _evaluate(call: Call, attend: Callable[[Sequence], tuple[Array, Array]]) -> Result:
    """The dense form with `attend` in place of the right mathematics."""
    exact_result = dense_form.evaluate(call)
    assert exact_result.lse is not None
    out, lse = np.zeros_like(exact_result.out), exact_result.lse.copy()
    for sequence in dense_form.sequences(call):
        taken = slice(sequence.first_row, sequence.first_row + len(sequence.query))
        out[taken], lse[taken] = attend(sequence)
    return Result(out, lse, exact_result.weights)


def _attend(sequence: Sequence, logits: Array | None = None, rounding: Rounding = exact) -> tuple[Array, Array]:
    logits = dense_form.scores(sequence, rounding) if logits is None else logits
    weights, lse = dense_form.softmax(logits, sequence.sinks, rounding)
    return dense_form.weigh(sequence, weights, rounding), lse


def _cap_after_bias(sequence: Sequence) -> tuple[Array, Array]:
    assert sequence.soft_cap is not None
    logits = dense_form.scores(dataclasses.replace(sequence, soft_cap=None))
    return _attend(
        sequence, np.where(np.isfinite(logits), sequence.soft_cap * np.tanh(logits / sequence.soft_cap), logits)
    )


def _cap_after_mask(sequence: Sequence) -> tuple[Array, Array]:
    assert sequence.soft_cap is not None
    logits = dense_form.scores(sequence)
    return _attend(sequence, np.where(np.isneginf(logits), -sequence.soft_cap, logits))


def _cap_through_exp(sequence: Sequence) -> tuple[Array, Array]:
    """The cap as `(e^s - e^-s) / (e^s + e^-s)` in float32, which overflows."""
    assert sequence.soft_cap is not None
    logits = dense_form.scores(dataclasses.replace(sequence, soft_cap=None, bias=np.zeros_like(sequence.bias)))
    with np.errstate(over="ignore", invalid="ignore"):
        up, down = (np.exp((sign * logits / sequence.soft_cap).astype(np.float32)) for sign in (1, -1))
        capped = (sequence.soft_cap * (up - down) / (up + down)).astype(np.float64) + sequence.bias
    return _attend(sequence, np.where(np.isneginf(logits), -np.inf, capped))


def _parts(sequence: Sequence, pieces: int = 2) -> list[Sequence]:
    """The sequence cut along its keys."""
    edges = np.linspace(0, len(sequence.key), pieces + 1).astype(int)
    return [
        dataclasses.replace(
            sequence,
            key=sequence.key[low:high],
            value=sequence.value[low:high],
            visible=sequence.visible[:, :, low:high],
            bias=sequence.bias[:, :, low:high],
            key_positions=sequence.key_positions[low:high],
        )
        for low, high in itertools.pairwise(edges)
    ]


def _merge(states: list[tuple[Array, Array]], exponential: Callable[[Array], Array] = np.exp) -> tuple[Array, Array]:
    """States over disjoint keys as one; `exponential` says in which base their LSEs are read."""
    outs, lses = np.stack([out for out, _ in states]), np.stack([lse for _, lse in states])
    pivot = lses.max(axis=0)
    pivot = np.where(np.isfinite(pivot), pivot, 0.0)
    weights = exponential(lses - pivot)
    total = weights.sum(axis=0)
    with np.errstate(divide="ignore"):
        lse = pivot + np.log(total)
    return (weights[..., None] * outs).sum(axis=0) / np.where(total > 0, total, 1.0)[..., None], lse


def _without_sinks(sequence: Sequence) -> Sequence:
    return dataclasses.replace(sequence, sinks=sequence.sinks[:, :0])


def _sinks_per_split(sequence: Sequence) -> tuple[Array, Array]:
    return _merge([_attend(part) for part in _parts(sequence)])


def _splits_merged_in_base_2(sequence: Sequence) -> tuple[Array, Array]:
    return _merge([_attend(_without_sinks(part)) for part in _parts(sequence)], np.exp2)


def _rescale_missing(sequence: Sequence) -> tuple[Array, Array]:
    """Every part accumulates against its own maximum, and the sums are added as they are."""
    out, total = np.zeros(()), np.zeros(())
    for part in _parts(_without_sinks(sequence)):
        partial, lse = _attend(part)
        largest = dense_form.scores(part).max(axis=2, initial=-np.inf).T
        weight = np.exp(lse - np.where(np.isfinite(largest), largest, 0.0))
        out, total = out + weight[..., None] * partial, total + weight
    with np.errstate(divide="ignore"):
        return out / np.where(total > 0, total, 1.0)[..., None], np.log(total)


def _boundary_key_lost(sequence: Sequence) -> tuple[Array, Array]:
    """The key behind a split boundary belongs to neither side."""
    if len(sequence.key) < 2:
        return _attend(sequence)
    visible = np.array(np.broadcast_to(sequence.visible, sequence.visible.shape))
    visible[:, :, len(sequence.key) // 2] = False
    return _attend(dataclasses.replace(sequence, visible=visible))


def _boundary_key_twice(sequence: Sequence) -> tuple[Array, Array]:
    logits = dense_form.scores(sequence)
    if len(sequence.key) > 1:
        logits[:, :, len(sequence.key) // 2] += np.log(2.0)
    return _attend(sequence, logits)


def _lse_in_base_2(sequence: Sequence) -> tuple[Array, Array]:
    out, lse = _attend(sequence)
    return out, lse / np.log(2.0)


def _lse_without_sinks(sequence: Sequence) -> tuple[Array, Array]:
    return _attend(sequence)[0], _attend(_without_sinks(sequence))[1]


def _alibi_from_chunk_start(sequence: Sequence) -> tuple[Array, Array]:
    """Distances counted from the first row of the chunk, for every row."""
    offset = sequence.query_positions - sequence.query_positions[:1]
    distance = sequence.key_positions[None, :] - sequence.query_positions[:, None]
    nonzero = distance != 0
    slope = np.where(nonzero.any(), sequence.bias.sum(axis=(1, 2)) / max(1.0, np.abs(distance.sum())), 0.0)
    slope = slope * np.sign(distance.sum())
    return _attend(dataclasses.replace(sequence, bias=sequence.bias + slope[:, None, None] * offset[None, :, None]))


def _kv_head_by_remainder(sequence: Sequence) -> tuple[Array, Array]:
    """Query head h reads KV head h % Hkv in place of h // G."""
    num_kv_heads, group_size = sequence.key.shape[1], sequence.query.shape[1] // sequence.key.shape[1]
    order = np.arange(num_kv_heads * group_size).reshape(group_size, num_kv_heads).T.ravel()
    shuffled = dataclasses.replace(sequence, query=sequence.query[:, order], sinks=sequence.sinks[order])
    out, lse = _attend(dataclasses.replace(shuffled, bias=sequence.bias[order]))
    back = np.argsort(order)
    return out[:, back], lse[:, back]


def _future_key_visible(sequence: Sequence) -> tuple[Array, Array]:
    """Causal masks that let each row see the next key."""
    rows_on = np.roll(sequence.visible, -1, axis=1)
    rows_on[:, -1] = True
    return _attend(dataclasses.replace(sequence, visible=sequence.visible | rows_on))


def _tf32(sequence: Sequence) -> tuple[Array, Array]:
    def rounded(values: Array) -> Array:
        bits = values.astype(np.float32).view(np.uint32)
        return ((bits + 0x1000) & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)

    return _attend(dataclasses.replace(sequence, query=rounded(sequence.query), key=rounded(sequence.key)))


def _no_keys_give_mean(sequence: Sequence) -> tuple[Array, Array]:
    """Rows without a key average the values that stand around."""
    out, lse = _attend(sequence)
    return np.where(np.isneginf(lse)[..., None], 0.25, out), lse


def _finite_maximum_of_masked_part(sequence: Sequence) -> tuple[Array, Array]:
    """A part whose keys are all masked claims the maximum 0, so that logits far below it underflow in float32."""
    logits = dense_form.scores(sequence)
    with np.errstate(under="ignore"):
        weights = np.exp(logits.astype(np.float32)).astype(np.float64)
    total = weights.sum(axis=2, keepdims=True)
    probabilities = weights / np.where(total > 0, total, 1.0)
    return dense_form.weigh(sequence, probabilities), _attend(sequence)[1]


def _capped_with_bias(case: Case) -> bool:
    return case.soft_cap is not None and (case.alibi or case.qq_bias > 0 or case.bias is not None)


def _several_rows(case: Case) -> bool:
    return max(case.query_lens) > 1


def _plain(case: Case) -> bool:
    return case.sinks == 0


WRONG_MATHEMATICS: dict[str, tuple[Callable[[Case], bool], Callable[[Sequence], tuple[Array, Array]]]] = {
    "cap_after_bias": (_capped_with_bias, _cap_after_bias),
    "cap_after_mask": (lambda case: case.soft_cap is not None and _several_rows(case), _cap_after_mask),
    "cap_through_exp": (lambda case: case.soft_cap is not None, _cap_through_exp),
    "sinks_per_split": (lambda case: case.sinks > 0, _sinks_per_split),
    "splits_merged_in_base_2": (_plain, _splits_merged_in_base_2),
    "rescale_missing": (_plain, _rescale_missing),
    "boundary_key_lost": (lambda case: True, _boundary_key_lost),
    "boundary_key_twice": (lambda case: True, _boundary_key_twice),
    "lse_in_base_2": (lambda case: case.return_lse, _lse_in_base_2),
    "lse_without_sinks": (lambda case: case.return_lse and case.sinks > 0, _lse_without_sinks),
    "alibi_from_chunk_start": (
        lambda case: case.alibi and _several_rows(case) and case.return_lse and case.qq_bias == 0,
        _alibi_from_chunk_start,
    ),
    "kv_head_by_remainder": (lambda case: case.num_kv_heads > 1 and case.group_size > 1, _kv_head_by_remainder),
    "future_key_visible": (lambda case: case.causal and _several_rows(case), _future_key_visible),
    "tf32": (lambda case: case.dtype == "float32", _tf32),
    "no_keys_give_mean": (lambda case: True, _no_keys_give_mean),
    "finite_maximum_of_masked_part": (lambda case: case.negative_logits, _finite_maximum_of_masked_part),
    "bfloat16_partials": (
        lambda case: case.dtype == "float32",
        lambda sequence: _attend(sequence, rounding=rounding_to("bfloat16")),
    ),
}
"""By name: which cases show the bug, and the attention of one sequence with it."""


def wrong_mathematics(call: Call, bug: str) -> Result:
    """The answer of an implementation with one of `WRONG_MATHEMATICS`."""
    return _evaluate(call, WRONG_MATHEMATICS[bug][1])


def wrong_call(call: Call, bug: str) -> Call:
    """The call that an implementation with one of `WRONG_CALLS` computes."""
    return WRONG_CALLS[bug][1](call)


def cases_showing(bugs: dict[str, Any], bug: str, cases: tuple[Case, ...]) -> tuple[Case, ...]:
    """The cases that can show a bug."""
    shows: Callable[[Case], bool] = bugs[bug][0]
    return tuple(case for case in cases if shows(case))
