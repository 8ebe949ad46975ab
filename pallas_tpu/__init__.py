"""Pallas kernels of the paged operations for TPUs. There are none yet: on a TPU every operation takes `xla`."""
