"""Pallas kernels of the operations over pages and dense rows, for TPUs. See `docs/tpu.md`."""
