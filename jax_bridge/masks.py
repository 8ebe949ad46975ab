"""Masks of dense attention."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_bridge.validation import BOOLEAN, INDEX, Arguments

_INT32_MAX = np.iinfo(np.int32).max


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("attention_mask", "q_segment_ids", "kv_segment_ids", "key_lengths"),
    meta_fields=("q_len", "kv_len"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class MaskInfo:
    """Which query may attend to which key; a pytree, made by one of the `from_...` functions.

    Segments and key lengths need no mask on platforms with a kernel: memory then does not grow with `Q * K`.

    Attributes:
        attention_mask: bool `[B, 1 or Hq, Q, K]`, True = may attend; None for segments and lengths.
        q_segment_ids: integers `[B, Q]`; None but for segments.
        kv_segment_ids: integers `[B, K]`; None but for segments.
        key_lengths: integers `[B]`; None but for lengths.
        q_len: `Q` of the mask that lengths stand for.
        kv_len: `K` of the mask that lengths stand for.
    """

    attention_mask: jax.Array | None = None
    q_segment_ids: jax.Array | None = None
    kv_segment_ids: jax.Array | None = None
    key_lengths: jax.Array | None = None
    q_len: int = 0
    kv_len: int = 0

    def __post_init__(self) -> None:
        ids = _narrowed_ids(self.q_segment_ids, self.kv_segment_ids)
        for name, array in zip(("q_segment_ids", "kv_segment_ids"), ids, strict=True):
            object.__setattr__(self, name, array)

    @classmethod
    def from_attention_mask(cls, mask: jax.Array) -> "MaskInfo":
        """A mask given as an array.

        Args:
            mask: bool `[B, 1 or Hq, Q, K]`, True = may attend.

        Raises:
            TypeError: the mask is not a boolean array.
            ValueError: the mask has not four axes.
        """
        check = Arguments("MaskInfo.from_attention_mask")
        return cls(attention_mask=check.array("mask", mask, ("B", "1 or Hq", "Q", "K"), BOOLEAN))

    @classmethod
    def from_segments(cls, q_segment_ids: jax.Array, kv_segment_ids: jax.Array) -> "MaskInfo":
        """A mask under which equal segments see each other; negative ids are padding and see nothing.

        Args:
            q_segment_ids: integers `[B, Q]`.
            kv_segment_ids: integers `[B, K]`.

        Raises:
            TypeError: the ids are not integer arrays.
            ValueError: they have not two axes, or different batches.
        """
        check = Arguments("MaskInfo.from_segments")
        check.array("q_segment_ids", q_segment_ids, ("B", "Q"), INDEX)
        check.array("kv_segment_ids", kv_segment_ids, ("B", "K"), INDEX)
        return cls(q_segment_ids=q_segment_ids, kv_segment_ids=kv_segment_ids)

    @classmethod
    def from_key_lengths(cls, key_lengths: jax.Array, q_len: int, kv_len: int) -> "MaskInfo":
        """A mask under which every row of a batch row sees its first keys only.

        Args:
            key_lengths: integers `[B]`, clamped to `[0, kv_len]`.
            q_len: how many rows `Q` there are.
            kv_len: how many keys `K` there are.

        Raises:
            TypeError: the lengths are not an integer array, or a size is not an integer.
            ValueError: the lengths have not one axis, or a size is negative.
        """
        check = Arguments("MaskInfo.from_key_lengths")
        return cls(
            key_lengths=check.array("key_lengths", key_lengths, ("B",), INDEX),
            q_len=check.integer("q_len", q_len, minimum=0),
            kv_len=check.integer("kv_len", kv_len, minimum=0),
        )

    def get_or_compute_attention_mask(self) -> Any:
        """The mask, bool `[B, 1 or Hq, Q, K]`.

        Raises:
            ValueError: there is neither a mask nor what it could be computed from.
        """
        if self.attention_mask is not None:
            return self.attention_mask
        if self.key_lengths is not None:
            visible = jnp.arange(self.kv_len) < jnp.asarray(self.key_lengths)[:, None, None, None]
            return jnp.broadcast_to(visible, (visible.shape[0], 1, self.q_len, self.kv_len))
        if self.q_segment_ids is None or self.kv_segment_ids is None:
            raise ValueError(
                "MaskInfo: attention_mask is None, expected it, both q_segment_ids and kv_segment_ids, or key_lengths"
            )
        q_ids = jnp.asarray(self.q_segment_ids)[:, None, :, None]
        kv_ids = jnp.asarray(self.kv_segment_ids)[:, None, None, :]
        # Ids of one sign only may be equal by wrapping round, where JAX brings both to one dtype.
        return (q_ids == kv_ids) & (q_ids >= 0) & (kv_ids >= 0)


def _narrowed_ids(*arrays: Any) -> tuple[Any, ...]:
    """Integer arrays of which only equality and sign count, without numpy's 64 bits, which JAX would wrap round."""
    is_numpy = [isinstance(ids, np.ndarray) and ids.dtype.kind in "iu" for ids in arrays]
    wide = [own and ids.dtype.itemsize == 8 for own, ids in zip(is_numpy, arrays, strict=True)]
    if jax.config.jax_enable_x64 or not any(wide):
        return arrays
    if not all(is_numpy):  # those of JAX have 32 bits: what does not fit equals none of them
        pairs = zip(wide, arrays, strict=True)
        return tuple(np.where(ids > _INT32_MAX, -1, ids).astype(np.int32) if is_wide else ids for is_wide, ids in pairs)
    positive = [np.maximum(ids, 0).astype(np.uint64) for ids in arrays]
    known = np.unique(np.concatenate([ids.reshape(-1) for ids in positive]))
    ranks = [np.searchsorted(known, ids).astype(np.int32) for ids in positive]
    return tuple(np.where(ids < 0, np.int32(-1), rank) for ids, rank in zip(arrays, ranks, strict=True))
