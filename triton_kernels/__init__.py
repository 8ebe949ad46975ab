"""Hand-written Triton attention kernels for paged KV caches. Imports Triton only, never JAX.

`jax_bridge` launches these kernels; `__project__` tells the package from triton-lang's of the same import name.
"""

__project__ = "jax-paged-attention"
