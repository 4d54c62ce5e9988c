// Where outputs and packed weights live: in large pages, whose translations stay in the TLB, and which are not given
// back to the system and zeroed again between two uses.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <vector>

namespace fused_resnet::cpu {

// An uninitialised dense channels_last tensor, size [N, C, H, W], fp32 or bf16, in memory that is kept when the tensor
// dies and handed to the next one of about its size. Measured on ResNet-50 at batch 16 in fp32: fresh pages for every
// output cost 40 % of an inference.
torch::stable::Tensor empty_channels_last(std::vector<int64_t> size, torch::headeronly::ScalarType dtype);

// Whether a 4-d tensor is dense channels_last: offsets in one are computed, not read from its strides.
bool is_channels_last(const torch::stable::Tensor& t);

// An uninitialised vector: a lasting one side by side with its likes, for they are many and of every size; another one
// in the same memory as outputs.
torch::stable::Tensor empty_packed(int64_t numel, torch::headeronly::ScalarType dtype, bool lasting);

// Returns the bytes that were kept for coming outputs, after giving them back to the system.
int64_t empty_cache();

// Asks for large pages under a buffer that starts at a multiple of 2 MB. A hint: nothing depends on it.
void advise_huge_pages(void* data, int64_t bytes);

}  // namespace fused_resnet::cpu
