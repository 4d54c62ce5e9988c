// The operators on CUDA. Tensors are dense channels_last of one device, float32, bfloat16 or float16, their addresses
// multiples of 16 (per-channel vectors, statistics and workspaces float32), and validated by the Python layer; outputs
// and workspaces are allocated there, and none of them is empty.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace fused_resnet::cuda {

using torch::stable::Tensor;

void add_act_fwd(Tensor x, Tensor residual, std::int64_t act, Tensor y);
void add_act_bwd(Tensor dy, std::optional<Tensor> y, std::optional<Tensor> x, std::optional<Tensor> residual,
                 std::int64_t act, Tensor dx);

// Calls body(name, kernel) for each of them, under its name in the namespace fused_resnet_C.
#define FUSED_RESNET_CUDA_OPERATORS(m)                                     \
  m.impl("cuda_add_act_fwd", TORCH_BOX(&fused_resnet::cuda::add_act_fwd)); \
  m.impl("cuda_add_act_bwd", TORCH_BOX(&fused_resnet::cuda::add_act_bwd))

}  // namespace fused_resnet::cuda
