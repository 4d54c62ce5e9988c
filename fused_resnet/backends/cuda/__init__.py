"""CUDA: the compiled kernels of csrc/cuda."""
