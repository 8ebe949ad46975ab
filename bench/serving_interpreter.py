"""Run the Triton kernel of unified attention on a saved step, under Triton's interpreter: `STEP.npz OUTPUT.npy`.

The environment of the process sets TRITON_INTERPRET=1.
"""

from __future__ import annotations

import sys

import jax.numpy as jnp
import numpy as np

from bench.serving_model import KV_LAYOUT
from jax_bridge import unified_attention


def main(source: str, target: str) -> None:
    """Read the arrays of `bench.serving_check.interpret_unified_attention`, write the outputs as float32."""
    with np.load(source) as step:
        dtype = str(step["dtype"])
        sequences = [jnp.asarray(step[name], dtype) for name in ("queries", "key_cache", "value_cache")]
        sequences += [jnp.asarray(step[name]) for name in ("kv_lens", "block_tables", "query_start_loc")]
    output = unified_attention(*sequences, kv_layout=KV_LAYOUT, platform="triton")
    np.save(target, np.asarray(output, np.float32))


if __name__ == "__main__":
    main(*sys.argv[1:])
