"""Masks of dense attention."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jax_bridge.validation import BOOLEAN, INDEX, Arguments


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("attention_mask", "q_segment_ids", "kv_segment_ids"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True, eq=False)
class MaskInfo:
    """Which query may attend to which key; a pytree, made by `from_attention_mask` or `from_segments`.

    Attributes:
        attention_mask: bool `[B, 1 or Hq, Q, K]`, True = may attend; None for segments.
        q_segment_ids: integers `[B, Q]`; None for an explicit mask.
        kv_segment_ids: integers `[B, K]`; None for an explicit mask.
    """

    attention_mask: jax.Array | None = None
    q_segment_ids: jax.Array | None = None
    kv_segment_ids: jax.Array | None = None

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

    def get_or_compute_attention_mask(self) -> Any:
        """The mask, bool `[B, 1 or Hq, Q, K]`.

        Raises:
            ValueError: neither a mask nor segments are given.
        """
        if self.attention_mask is not None:
            return self.attention_mask
        if self.q_segment_ids is None or self.kv_segment_ids is None:
            raise ValueError("MaskInfo: attention_mask is None, expected it or both q_segment_ids and kv_segment_ids")
        q_ids = jnp.asarray(self.q_segment_ids)[:, None, :, None]
        kv_ids = jnp.asarray(self.kv_segment_ids)[:, None, None, :]
        return (q_ids == kv_ids) & (q_ids >= 0)
