// Max pooling for inference: aten's keeps an index of 8 bytes for each output.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace fused_resnet::cpu {

// x and out dense channels_last, fp32 or bf16. geometry: kernel, stride and padding, each (height, width); the padding
// is at most half of the kernel, so that every window has a pixel.
void max_pool(torch::stable::Tensor x, std::vector<int64_t> geometry, torch::stable::Tensor out);

}  // namespace fused_resnet::cpu
