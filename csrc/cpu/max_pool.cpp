#include "cpu/max_pool.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "cpu/elementwise.h"

namespace fused_resnet::cpu {
namespace {

struct MaxPoolArgs {
  const void* x;
  void* out;
  std::int64_t channels, h, w, p, q, r, s, stride_h, stride_w, pad_h, pad_w;
  bool bf16;
};

}  // namespace
}  // namespace fused_resnet::cpu

#define FUSED_RESNET_KERNELS "cpu/max_pool_kernels.h"
#include "cpu/per_isa.h"

namespace fused_resnet::cpu {

void max_pool(torch::stable::Tensor x, std::vector<int64_t> geometry, torch::stable::Tensor out) {
  STD_TORCH_CHECK(x.dim() == 4 && out.dim() == 4 && geometry.size() == 6, "max_pool: x and out must be 4-d");
  STD_TORCH_CHECK(x.scalar_type() == out.scalar_type(), "max_pool: x and out must have one dtype");
  const auto in = x.sizes(), size = out.sizes();
  const MaxPoolArgs args{x.const_data_ptr(),
                         out.mutable_data_ptr(),
                         in[1],
                         in[2],
                         in[3],
                         size[2],
                         size[3],
                         geometry[0],
                         geometry[1],
                         geometry[2],
                         geometry[3],
                         geometry[4],
                         geometry[5],
                         is_bf16(x)};
  STD_TORCH_CHECK(size[0] == in[0] && size[1] == in[1] && 2 * args.pad_h <= args.r && 2 * args.pad_w <= args.s &&
                      (args.p - 1) * args.stride_h + args.r <= args.h + 2 * args.pad_h &&
                      (args.q - 1) * args.stride_w + args.s <= args.w + 2 * args.pad_w,
                  "max_pool: out does not fit");
  const auto kernel = FUSED_RESNET_PICK(max_pool);
  torch::stable::parallel_for(0, in[0] * args.p, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row)
      kernel(args, row);
  });
}

}  // namespace fused_resnet::cpu
