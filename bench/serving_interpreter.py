"""Run the Triton kernel of page attention on a saved step, under Triton's interpreter: `STEP.npz OUTPUT.npy`.

The environment of the process sets TRITON_INTERPRET=1.
"""

from __future__ import annotations

import sys

import jax.numpy as jnp
import numpy as np

from bench.serving_model import KV_LAYOUT
from jax_bridge import page_attention


def main(source: str, target: str) -> None:
    """Read the arrays of `bench.serving_check.interpret_page_attention`, write the outputs as float32 `[S, Hq, D]`."""
    with np.load(source) as step:
        dtype = str(step["dtype"])
        query, key_cache, value_cache = (jnp.asarray(step[name], dtype) for name in ("query", "key", "value"))
        lens, tables = (jnp.asarray(step[name]) for name in ("lens", "tables"))
    output = page_attention(query, key_cache, value_cache, lens, tables, kv_layout=KV_LAYOUT, platform="triton")
    np.save(target, np.asarray(output, np.float32))


if __name__ == "__main__":
    main(*sys.argv[1:])
