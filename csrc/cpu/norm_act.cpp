#include "cpu/norm_act.h"

#include <algorithm>
#include <memory>

#include "cpu/max_pool.h"
#include "cpu/train.h"

#define FUSED_RESNET_KERNELS "cpu/norm_act_kernels.h"
#include "cpu/per_isa.h"

namespace fused_resnet::cpu {
namespace {

constexpr std::int64_t kStreamFrom = 1 << 20, kStreamBesideGradientFrom = 16 << 20;

// Writing a float32 output past the caches spares a read of it: measured on 1.6 to 51 MB (2 cores, 2 MB of L2 each), a
// pass takes 0.5 to 1.0 of its time so. Not where g has just been written to the caches and is read beside it: up to
// 13 MB that takes 1.25 to 1.8 of the time.
bool worth_streaming(const NormActArgs& args, const Grid& grid, bool beside_gradient) {
  const auto whole_lines = [&](const void* out) { return reinterpret_cast<std::uintptr_t>(out) % 64 == 0; };
  const std::int64_t from = beside_gradient ? kStreamBesideGradientFrom : kStreamFrom;
  return !args.bf16 && whole_lines(args.out) && whole_lines(args.dresidual) && grid.channels % 16 == 0 &&
         4 * grid.rows * grid.channels >= from;
}

// What the passes over one problem share: their arguments, and the vectors that these point to.
struct Problem {
  enum Vector { kScale, kShift, kResidualScale, kResidualShift, kMeanG, kSlope, kResidualSlope, kVectors };

  const Grid& grid;
  const Norm norm, residual_norm;
  const Workspace work;
  NormActArgs args;

  Problem(const Grid& grid, const Tensor& x, const Norm& norm, const std::optional<Tensor>& residual,
          const Norm& residual_norm, std::int64_t act)
      : grid(grid), norm(norm), residual_norm(residual_norm), work(grid, kVectors, residual_norm ? 3 : 2) {
    STD_TORCH_CHECK(residual || !residual_norm, "norm_act: there is a norm of the residual, and no residual");
    args.x = x.const_data_ptr();
    args.residual = data_or_null(residual);
    args.channels = grid.channels;
    args.act = static_cast<int>(act);
    args.bf16 = is_bf16(x);
    args.norm = norm.affine(grid, work.vector(kScale), work.vector(kShift));
    args.residual_norm = residual_norm.affine(grid, work.vector(kResidualScale), work.vector(kResidualShift));
  }
};

float* floats(const Tensor& t) {
  return static_cast<float*>(t.mutable_data_ptr());
}

void* mutable_or_null(const std::optional<Tensor>& t) {
  return t ? t->mutable_data_ptr() : nullptr;
}

// Where a pass has dy from: memory, or the gradient of a max pool behind it, one tile of which is made at a time.
class Gradient {
 public:
  explicit Gradient(const Tensor& dy) : dy_(dy.const_data_ptr()) {}
  explicit Gradient(const PooledGradient& pooled) : pooled_(&pooled) {}

  // Calls body(args, tile) with dy in the arguments.
  template <class Body>
  void with_tile(NormActArgs args, const Tile& tile, const Body& body) const {
    if (!pooled_) {
      args.dy = dy_;
      return body(args, tile);
    }
    const std::int64_t row_bytes = args.channels * (args.bf16 ? 2 : 4);
    const std::unique_ptr<char[]> made(new char[tile.rows * row_bytes]);
    FUSED_RESNET_PICK(max_pool_grad_tile)(*pooled_, tile, made.get());
    args.dy = made.get();
    args.x = static_cast<const char*>(args.x) + tile.row * row_bytes;
    if (args.out) args.out = static_cast<char*>(args.out) + tile.row * row_bytes;
    body(args, Tile{0, tile.rows, tile.channel, tile.channels});
  }

 private:
  const void* dy_ = nullptr;
  const PooledGradient* pooled_ = nullptr;
};

// dbias = sum(g); dweight = sum(g * xhat), xhat = (x - mean) / sqrt(var + eps); dresidual_weight likewise.
void reduce(const Problem& problem, const Gradient& gradient, const Tensor& dweight, const Tensor& dbias,
            const std::optional<Tensor>& dresidual_weight) {
  const Norm &norm = problem.norm, &residual_norm = problem.residual_norm;
  STD_TORCH_CHECK(!residual_norm == !dresidual_weight, "norm_act_reduce: dresidual_weight is of the residual's norm");
  const Grid& grid = problem.grid;
  const Workspace& work = problem.work;
  const auto kernel = FUSED_RESNET_PICK(norm_act_reduce_tile);
  grid.for_tiles(false, [&](const Tile& whole, std::int64_t t) {
    gradient.with_tile(problem.args, whole, [&](const NormActArgs& args, const Tile& tile) {
      kernel(args, tile, {work.partial(t, 0), work.partial(t, 1), residual_norm ? work.partial(t, 2) : nullptr});
    });
  });

  float *dweight_out = floats(dweight), *dbias_out = floats(dbias);
  const auto merge = FUSED_RESNET_PICK(bn_merge_sums);
  grid.for_channel_blocks([&](std::int64_t first, int n) {
    double sum[kMergeBlock];
    const auto merged = [&](int which) {
      merge(work.partial(0, which) + first, grid.row_tiles, work.partial_stride(), n, sum);
    };
    merged(0);
    for (int i = 0; i < n; ++i)
      dbias_out[first + i] = static_cast<float>(sum[i]);
    merged(1);
    for (int i = 0; i < n; ++i)
      dweight_out[first + i] = static_cast<float>(sum[i] * norm.inverse_deviation(first + i));
    if (!residual_norm) return;
    merged(2);
    for (int i = 0; i < n; ++i)
      floats(*dresidual_weight)[first + i] = static_cast<float>(sum[i] * residual_norm.inverse_deviation(first + i));
  });
}

// dx = weight / sqrt(var + eps) * (g - dbias / count - xhat * dweight / count); dresidual likewise.
void input_grad(Problem& problem, const Gradient& gradient, const Tensor& dweight, const Tensor& dbias,
                const std::optional<Tensor>& dresidual_weight, double count, const Tensor& dx,
                const std::optional<Tensor>& dresidual) {
  const Norm &norm = problem.norm, &residual_norm = problem.residual_norm;
  STD_TORCH_CHECK(!residual_norm == !dresidual_weight && !residual_norm == !dresidual,
                  "norm_act_input_grad: dresidual_weight and dresidual are of the residual's norm");
  const Grid& grid = problem.grid;
  float *mean_g = problem.work.vector(Problem::kMeanG), *slope = problem.work.vector(Problem::kSlope);
  float* residual_slope = problem.work.vector(Problem::kResidualSlope);
  const float *dweight_in = floats(dweight), *dbias_in = floats(dbias);
  grid.for_channel_blocks([&](std::int64_t first, int n) {
    for (std::int64_t c = first; c < first + n; ++c) {
      mean_g[c] = static_cast<float>(dbias_in[c] / count);
      slope[c] = static_cast<float>(dweight_in[c] * norm.inverse_deviation(c) / count);
      if (residual_norm)
        residual_slope[c] =
            static_cast<float>(floats(*dresidual_weight)[c] * residual_norm.inverse_deviation(c) / count);
    }
  });
  NormActArgs& args = problem.args;
  args.out = dx.mutable_data_ptr();
  args.dresidual = mutable_or_null(dresidual);
  args.stream = worth_streaming(args, grid, args.act == kNone);  // dy is then g, and new
  args.mean_g = mean_g;
  args.slope = slope;
  args.residual_slope = residual_slope;
  const auto kernel = FUSED_RESNET_PICK(norm_act_input_grad_tile);
  grid.for_tiles(true, [&](const Tile& tile, std::int64_t) { gradient.with_tile(args, tile, kernel); });
}

}  // namespace

void norm_act(Tensor x, Tensor mean, Tensor var, std::optional<Tensor> weight, std::optional<Tensor> bias, double eps,
              std::optional<Tensor> residual, std::optional<Tensor> residual_mean, std::optional<Tensor> residual_var,
              std::optional<Tensor> residual_weight, std::optional<Tensor> residual_bias, double residual_eps,
              std::int64_t act, Tensor y) {
  const Grid grid(x);
  if (grid.empty()) return;
  Problem problem(grid, x, {mean, var, weight, bias, eps}, residual,
                  {residual_mean, residual_var, residual_weight, residual_bias, residual_eps}, act);
  NormActArgs& args = problem.args;
  args.out = y.mutable_data_ptr();
  args.stream = worth_streaming(args, grid, false);
  const auto kernel = FUSED_RESNET_PICK(norm_act_tile);
  grid.for_tiles(true, [&](const Tile& tile, std::int64_t) { kernel(args, tile); });
}

void norm_act_reduce(Tensor dy, Tensor x, Tensor mean, Tensor var, std::optional<Tensor> weight,
                     std::optional<Tensor> bias, double eps, std::optional<Tensor> residual,
                     std::optional<Tensor> residual_mean, std::optional<Tensor> residual_var,
                     std::optional<Tensor> residual_weight, std::optional<Tensor> residual_bias, double residual_eps,
                     std::optional<Tensor> y, std::int64_t act, std::optional<Tensor> g, Tensor dweight, Tensor dbias,
                     std::optional<Tensor> dresidual_weight) {
  const Grid grid(x);
  if (grid.empty()) return;
  Problem problem(grid, x, {mean, var, weight, bias, eps}, residual,
                  {residual_mean, residual_var, residual_weight, residual_bias, residual_eps}, act);
  problem.args.y = data_or_null(y);
  problem.args.out = mutable_or_null(g);
  reduce(problem, Gradient(dy), dweight, dbias, dresidual_weight);
}

void norm_act_input_grad(Tensor dy, Tensor x, Tensor mean, Tensor var, std::optional<Tensor> weight,
                         std::optional<Tensor> bias, double eps, std::optional<Tensor> residual,
                         std::optional<Tensor> residual_mean, std::optional<Tensor> residual_var,
                         std::optional<Tensor> residual_weight, std::optional<Tensor> residual_bias,
                         double residual_eps, std::optional<Tensor> y, std::int64_t act, Tensor dweight, Tensor dbias,
                         std::optional<Tensor> dresidual_weight, double count, Tensor dx,
                         std::optional<Tensor> dresidual) {
  const Grid grid(x);
  if (grid.empty()) return;
  Problem problem(grid, x, {mean, var, weight, bias, eps}, residual,
                  {residual_mean, residual_var, residual_weight, residual_bias, residual_eps}, act);
  problem.args.y = data_or_null(y);
  input_grad(problem, Gradient(dy), dweight, dbias, dresidual_weight, count, dx, dresidual);
}

void norm_act_max_pool_reduce(Tensor dy, Tensor argmax, Tensor x, Tensor mean, Tensor var, std::optional<Tensor> weight,
                              std::optional<Tensor> bias, double eps, std::int64_t act,
                              std::vector<std::int64_t> geometry, Tensor dweight, Tensor dbias) {
  const Grid grid(x);
  if (grid.empty()) return;
  const PooledGradient pooled(x, dy, argmax, geometry);
  const Problem problem(grid, x, {mean, var, weight, bias, eps}, {}, {}, act);
  reduce(problem, Gradient(pooled), dweight, dbias, {});
}

void norm_act_max_pool_input_grad(Tensor dy, Tensor argmax, Tensor x, Tensor mean, Tensor var,
                                  std::optional<Tensor> weight, std::optional<Tensor> bias, double eps,
                                  std::int64_t act, std::vector<std::int64_t> geometry, Tensor dweight, Tensor dbias,
                                  double count, Tensor dx) {
  const Grid grid(x);
  if (grid.empty()) return;
  const PooledGradient pooled(x, dy, argmax, geometry);
  Problem problem(grid, x, {mean, var, weight, bias, eps}, {}, {}, act);
  input_grad(problem, Gradient(pooled), dweight, dbias, {}, count, dx, {});
}

// The same pass about the mean 0.
void scale_act(Tensor x, Tensor scale, Tensor shift, std::optional<Tensor> residual, std::int64_t act, Tensor out) {
  const Grid grid(x);
  if (grid.empty()) return;
  const Workspace work(grid, 1, 0);
  std::fill_n(work.vector(0), grid.channels, 0.0f);
  NormActArgs args;
  args.x = x.const_data_ptr();
  args.residual = data_or_null(residual);
  args.out = out.mutable_data_ptr();
  args.channels = grid.channels;
  args.act = static_cast<int>(act);
  args.bf16 = is_bf16(x);
  args.norm = {work.vector(0), floats(scale), floats(shift)};
  const auto kernel = FUSED_RESNET_PICK(norm_act_tile);
  grid.for_tiles(false, [&](const Tile& tile, std::int64_t) { kernel(args, tile); });
}

}  // namespace fused_resnet::cpu
