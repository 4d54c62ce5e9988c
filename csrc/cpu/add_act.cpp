#include <torch/csrc/stable/ops.h>

#include "cpu/elementwise.h"
#include "cpu/train.h"

namespace fused_resnet::cpu {
namespace {

// What the kernels read and write, element by element.
struct AddActArgs {
  const void* x = nullptr;
  const void* residual = nullptr;
  const void* dy = nullptr;
  const void* y = nullptr;
  void* out = nullptr;
  int act = 0;
  bool bf16 = false;
};

}  // namespace
}  // namespace fused_resnet::cpu

#define FUSED_RESNET_KERNELS "cpu/add_act_kernels.h"
#include "cpu/per_isa.h"

namespace fused_resnet::cpu {
namespace {

constexpr std::int64_t kGrain = 1 << 15;

}  // namespace

// y = act(x + residual)
void add_act_fwd(Tensor x, Tensor residual, std::int64_t act, Tensor y) {
  if (x.numel() == 0) return;
  AddActArgs args;
  args.x = x.const_data_ptr();
  args.residual = residual.const_data_ptr();
  args.out = y.mutable_data_ptr();
  args.act = static_cast<int>(act);
  args.bf16 = is_bf16(x);
  const auto kernel = FUSED_RESNET_PICK(add_act);
  torch::stable::parallel_for(0, x.numel(), kGrain,
                              [&](std::int64_t begin, std::int64_t end) { kernel(args, begin, end); });
}

// dx = dy * act'(x + residual): ReLU and ReLU6 read y, hardswish and SiLU read x and residual.
void add_act_bwd(Tensor dy, std::optional<Tensor> y, std::optional<Tensor> x, std::optional<Tensor> residual,
                 std::int64_t act, Tensor dx) {
  if (dy.numel() == 0) return;
  AddActArgs args;
  args.dy = dy.const_data_ptr();
  args.y = data_or_null(y);
  args.x = data_or_null(x);
  args.residual = data_or_null(residual);
  args.out = dx.mutable_data_ptr();
  args.act = static_cast<int>(act);
  args.bf16 = is_bf16(dy);
  const auto kernel = FUSED_RESNET_PICK(add_act_grad);
  torch::stable::parallel_for(0, dy.numel(), kGrain,
                              [&](std::int64_t begin, std::int64_t end) { kernel(args, begin, end); });
}

}  // namespace fused_resnet::cpu
