"""CUDA: the compiled kernels of csrc/cuda, on NVIDIA GPUs from sm_80 on."""
