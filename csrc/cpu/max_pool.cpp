#include "cpu/max_pool.h"

#include <algorithm>

#include "cpu/norm.h"

namespace fused_resnet::cpu {
namespace {

struct MaxPoolArgs {
  Pool pool;
  const void* x;
  void* out;
  bool bf16;
  std::uint8_t* argmax = nullptr;  // always there with a norm
  Affine norm{};
  int act = kNone;
};

}  // namespace
}  // namespace fused_resnet::cpu

#define FUSED_RESNET_KERNELS "cpu/max_pool_kernels.h"
#include "cpu/per_isa.h"

namespace fused_resnet::cpu {
namespace {

void for_rows(const Tensor& x, const MaxPoolArgs& args) {
  const auto kernel = FUSED_RESNET_PICK(max_pool_of);
  torch::stable::parallel_for(0, x.size(0) * args.pool.p, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row)
      kernel(args, row);
  });
}

}  // namespace

Pool::Pool(const Tensor& x, const Tensor& out, const std::vector<std::int64_t>& geometry) {
  STD_TORCH_CHECK(x.dim() == 4 && out.dim() == 4 && geometry.size() == 6, "max_pool: x and out must be 4-d");
  STD_TORCH_CHECK(x.scalar_type() == out.scalar_type(), "max_pool: x and out must have one dtype");
  channels = x.size(1), h = x.size(2), w = x.size(3), p = out.size(2), q = out.size(3);
  r = geometry[0], s = geometry[1], stride_h = geometry[2], stride_w = geometry[3];
  pad_h = geometry[4], pad_w = geometry[5];
  STD_TORCH_CHECK(out.size(0) == x.size(0) && out.size(1) == channels && 2 * pad_h <= r && 2 * pad_w <= s &&
                      (p - 1) * stride_h + r <= h + 2 * pad_h && (q - 1) * stride_w + s <= w + 2 * pad_w,
                  "max_pool: out does not fit");
}

void Pool::check_argmax(const Tensor& argmax) const {
  STD_TORCH_CHECK(argmax.scalar_type() == torch::headeronly::ScalarType::Byte && argmax.dim() == 4 &&
                      argmax.size(1) == channels && argmax.size(2) == p && argmax.size(3) == q,
                  "max_pool: argmax must have a byte for each output");
  STD_TORCH_CHECK(r * s <= 256, "max_pool: a window of more than 256 taps has no argmax");
}

PooledGradient::PooledGradient(const Tensor& x, const Tensor& dy, const Tensor& argmax,
                               const std::vector<std::int64_t>& geometry)
    : pool(x, dy, geometry),
      dy(dy.const_data_ptr()),
      argmax(static_cast<const std::uint8_t*>(argmax.const_data_ptr())),
      bf16(is_bf16(dy)) {
  pool.check_argmax(argmax);
}

void max_pool(Tensor x, std::vector<std::int64_t> geometry, Tensor out, std::optional<Tensor> argmax) {
  MaxPoolArgs args{{x, out, geometry}, x.const_data_ptr(), out.mutable_data_ptr(), is_bf16(x)};
  if (argmax) {
    args.pool.check_argmax(*argmax);
    args.argmax = static_cast<std::uint8_t*>(argmax->mutable_data_ptr());
  }
  for_rows(x, args);
}

void norm_act_max_pool(Tensor x, Tensor mean, Tensor var, std::optional<Tensor> weight, std::optional<Tensor> bias,
                       double eps, std::int64_t act, std::vector<std::int64_t> geometry, Tensor out, Tensor argmax) {
  const Grid grid(x);
  if (grid.empty()) return;
  const Workspace work(grid, 2, 0);
  MaxPoolArgs args{{x, out, geometry}, x.const_data_ptr(), out.mutable_data_ptr(), is_bf16(x)};
  args.pool.check_argmax(argmax);
  args.argmax = static_cast<std::uint8_t*>(argmax.mutable_data_ptr());
  args.norm = Norm(mean, var, weight, bias, eps).affine(grid, work.vector(0), work.vector(1));
  args.act = static_cast<int>(act);
  for_rows(x, args);
}

void max_pool_bwd(Tensor dy, Tensor argmax, std::vector<std::int64_t> geometry, Tensor dx) {
  const Grid grid(dx);
  if (grid.empty()) return;
  const PooledGradient grad(dx, dy, argmax, geometry);
  auto* out = static_cast<char*>(dx.mutable_data_ptr());
  const std::int64_t row_bytes = grid.channels * (grad.bf16 ? 2 : 4);
  const auto kernel = FUSED_RESNET_PICK(max_pool_grad_tile);
  grid.for_tiles(false, [&](const Tile& tile, std::int64_t) { kernel(grad, tile, out + tile.row * row_bytes); });
}

}  // namespace fused_resnet::cpu
