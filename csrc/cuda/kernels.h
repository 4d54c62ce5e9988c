// The operators on CUDA. Tensors are dense channels_last of one device, float32, bfloat16 or float16, their addresses
// multiples of 16 (per-channel vectors, statistics and workspaces float32), and validated by the Python layer; outputs
// and workspaces are allocated there, and none of them is empty.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace fused_resnet::cuda {

using torch::stable::Tensor;

void add_act_fwd(Tensor x, Tensor residual, std::int64_t act, Tensor y);
void add_act_bwd(Tensor dy, std::optional<Tensor> y, std::optional<Tensor> x, std::optional<Tensor> residual,
                 std::int64_t act, Tensor dx);

// Convolutions: weights are packed by the Python layer; geometry is window, stride, padding and dilation, each (height,
// width). A depthwise tile is the rows and channels of a thread, and the warps of a block.
void depthwise_fwd(Tensor x, Tensor weight, std::optional<Tensor> scale, std::optional<Tensor> shift,
                   std::optional<Tensor> residual, std::vector<std::int64_t> geometry, std::vector<std::int64_t> tile,
                   std::int64_t act, Tensor out);
void depthwise_dgrad(Tensor grad, Tensor weight, std::vector<std::int64_t> geometry, std::vector<std::int64_t> tile,
                     Tensor dx);
void depthwise_wgrad(Tensor grad, Tensor x, std::vector<std::int64_t> geometry, Tensor workspace, Tensor dweight);

// The first layer's. A tile is rows, columns, 16 pixels a warp's times (2 or 4), and channels (32 or 64).
void stem(Tensor x, Tensor weight, Tensor scale, Tensor shift, std::optional<Tensor> residual,
          std::vector<std::int64_t> geometry, std::vector<std::int64_t> tile, bool tf32, std::int64_t act, Tensor out);

// Calls body(name, kernel) for each of them, under its name in the namespace fused_resnet_C.
#define FUSED_RESNET_CUDA_OPERATORS(m)                                             \
  m.impl("cuda_add_act_fwd", TORCH_BOX(&fused_resnet::cuda::add_act_fwd));         \
  m.impl("cuda_add_act_bwd", TORCH_BOX(&fused_resnet::cuda::add_act_bwd));         \
  m.impl("cuda_depthwise_fwd", TORCH_BOX(&fused_resnet::cuda::depthwise_fwd));     \
  m.impl("cuda_depthwise_dgrad", TORCH_BOX(&fused_resnet::cuda::depthwise_dgrad)); \
  m.impl("cuda_depthwise_wgrad", TORCH_BOX(&fused_resnet::cuda::depthwise_wgrad)); \
  m.impl("cuda_stem", TORCH_BOX(&fused_resnet::cuda::stem))

}  // namespace fused_resnet::cuda
