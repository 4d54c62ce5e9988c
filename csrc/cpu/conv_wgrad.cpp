#include "cpu/conv_wgrad.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "cpu/conv.h"
#include "cpu/conv_wgrad_plan.h"
#include "cpu/elementwise.h"
#include "cpu/memory.h"

#define FUSED_RESNET_KERNELS "cpu/conv_wgrad_kernels.h"
#include "cpu/per_isa.h"

namespace fused_resnet::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kChunkChannels = 512;  // of dy, packed at once
constexpr int64_t kBandBytes =
    512 << 10;  // of dy and x in a band: the next band's and the packed dy lie in L2 beside them
constexpr int64_t kSlabBytes = 24 << 10;  // of packed x: half of L1
constexpr int64_t kSlabPixels = 96;       // fewer would load and store the accumulators too often
constexpr int64_t kFoldPixels = 96;       // of 160 floats in a stem

int64_t panel_width() {
  return FUSED_RESNET_PICK(kWgradPanel);
}

// How the input is seen, from sizes and geometry.
void set_layout(WgradShape& g) {
  g.flat = g.r * g.s * g.stride_h * g.stride_w == 1 && g.pad_h + g.pad_w == 0;
  if (g.flat) {
    g.h = g.p = g.n * g.h * g.w;
    g.n = g.w = g.q = 1;
  }
  g.fold = g.r * g.s > 1 && g.c < panel_width();
  g.channels = g.fold ? g.r * g.s * g.c : g.c;
  g.taps = g.fold ? 1 : g.r * g.s;
  g.source_h = g.r == 1 ? g.stride_h : 1;
  g.source_w = g.s == 1 ? g.stride_w : 1;
  g.step_h = g.stride_h / g.source_h;
  g.step_w = g.stride_w / g.source_w;
  g.span_h = (g.r - 1) * g.dilation_h + 1;
  g.columns = (g.q - 1) * g.step_w + (g.s - 1) * g.dilation_w + 1;
}

// Threads form a grid over output channels, input channels and rows; `rows` of them share each sum.
struct Split {
  int64_t k, panels, rows;
};

Split split(const WgradShape& g) {
  const double pixels = 1.0 * g.n * g.p * g.q, sums = 1.0 * g.k * g.channels * g.taps;
  const double rate = 1.3e11, bandwidth = 4e9;  // flop and floats per second of one core; only their ratio matters
  const int64_t rows = g.n * g.p, panels = ceil_div(g.channels, panel_width());
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), 1 + 2 * pixels * sums / 1e6);
  Split best{1, 1, 1};
  double least = -1;
  for (int64_t k = 1; k <= std::min(threads, g.k); ++k)
    for (int64_t c = 1; k * c <= threads && c <= panels; ++c) {
      const int64_t parts = std::min(threads / (k * c), rows);
      const double k_share = 1.0 * ceil_div(g.k, k) / g.k, c_share = 1.0 * ceil_div(panels, c) / panels;
      const double row_share = 1.0 * ceil_div(rows, parts) / rows;
      const double chunks = ceil_div(ceil_div(g.k, k), kChunkChannels);
      const double packed = row_share * (1.0 * g.n * g.h * g.w * g.c * c_share * chunks + pixels * g.k * k_share);
      const double merged = sums * (parts > 1 ? k_share * c_share + 1.0 * (parts + 1) / threads : k_share * c_share);
      const double cost = 2 * pixels * sums * k_share * c_share * row_share / rate + (packed + merged) / bandwidth;
      if (least < 0 || cost < least) best = {k, c, parts}, least = cost;
    }
  return best;
}

// Cuts the output channels into blocks of about equal height, and the rows by what stays in the caches.
WgradPlan make_plan(const WgradShape& g, const Split& grid) {
  WgradPlan plan{};
  const int64_t width = panel_width(), height = FUSED_RESNET_PICK(kWgradBlock), slack = FUSED_RESNET_PICK(kWgradCopy);
  int64_t most = 0, most_blocks = 0;  // channels and blocks of a chunk
  plan.chunks.push_back(0);
  for (int64_t part = 0; part < grid.k; ++part) {
    const int64_t first = g.k * part / grid.k, size = g.k * (part + 1) / grid.k - first;
    const int64_t chunks = ceil_div(size, kChunkChannels);
    for (int64_t i = 0; i < chunks; ++i) {
      const int64_t begin = first + size * i / chunks, channels = first + size * (i + 1) / chunks - begin;
      const int64_t blocks = ceil_div(channels, height);
      for (int64_t b = 0; b < blocks; ++b)
        plan.blocks.push_back(begin + channels * b / blocks);
      plan.chunks.push_back(plan.blocks.size());
      most = std::max(most, channels), most_blocks = std::max(most_blocks, blocks);
    }
  }
  plan.blocks.push_back(g.k);
  plan.panels = ceil_div(g.channels, width);

  const int64_t rows = ceil_div(g.n * g.p, grid.rows),
                row_bytes = g.step_h * g.columns * width * int64_t{sizeof(float)};
  const int64_t in_pixels = g.step_h * g.step_w;
  plan.slab_rows = std::max(kSlabBytes / row_bytes, ceil_div(kSlabPixels, g.q));
  if (g.fold) plan.slab_rows = ceil_div(kFoldPixels, g.q);
  plan.slab_rows = std::min(plan.slab_rows, rows);
  plan.band_rows = g.fold ? plan.slab_rows : kBandBytes / (g.q * (most + g.c * in_pixels) * int64_t{sizeof(float)});
  plan.band_rows = std::clamp(plan.band_rows / plan.slab_rows * plan.slab_rows, plan.slab_rows, rows);
  const int64_t images = (plan.slab_rows + g.p - 2) / g.p + 1;
  const int64_t packed_rows = plan.slab_rows * g.step_h + images * std::max<int64_t>(0, g.span_h - g.step_h);
  plan.dy_floats = plan.band_rows * g.q * most + most_blocks * slack;
  plan.x_floats =
      g.fold ? plan.slab_rows * g.q * plan.panels * width + g.s * g.c + slack : packed_rows * g.columns * width;
  plan.lone_floats = most * g.taps * width;
  return plan;
}

int64_t aligned(int64_t floats) {
  return ceil_div(floats, 16) * 16;
}

void run(const WgradShape& g, const WgradArgs& args) {
  const Split grid = split(g);
  const WgradPlan plan = make_plan(g, grid);
  const int64_t rows = g.n * g.p, width = panel_width(), tasks = grid.k * grid.panels * grid.rows;
  const bool lone = grid.rows == 1 && plan.band_rows >= rows;
  const int64_t part_floats = lone ? 0 : plan.panels * g.k * g.taps * width;
  const int64_t dy_floats = aligned(plan.dy_floats), x_floats = aligned(plan.x_floats);
  const int64_t scratch = dy_floats + x_floats + (lone ? plan.lone_floats : 0);
  const Tensor workspace = empty_packed(tasks * scratch + grid.rows * part_floats, ScalarType::Float, false);
  float* sums = static_cast<float*>(workspace.mutable_data_ptr());
  float* scratches = sums + grid.rows * part_floats;
  const int64_t chunks = static_cast<int64_t>(plan.chunks.size()) - 1;

  std::vector<int64_t> part_chunks{0};  // first chunk of each part of the output channels
  for (int64_t part = 1, chunk = 0; part <= grid.k; ++part) {
    while (chunk < chunks && plan.blocks[plan.chunks[chunk]] < g.k * part / grid.k)
      ++chunk;
    part_chunks.push_back(chunk);
  }
  const auto task_kernel = FUSED_RESNET_PICK(wgrad_task);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = i % grid.k, c = i / grid.k % grid.panels, part = i / (grid.k * grid.panels);
      float* own = scratches + i * scratch;
      task_kernel(g, args, plan,
                  {part_chunks[k], part_chunks[k + 1], plan.panels * c / grid.panels,
                   plan.panels * (c + 1) / grid.panels, rows * part / grid.rows, rows * (part + 1) / grid.rows, own,
                   own + dy_floats, lone ? own + dy_floats + x_floats : sums + part * part_floats, lone, grid.rows == 1,
                   lone ? 0 : g.k * g.taps * width});
    }
  });
  if (grid.rows == 1) return;
  const auto finish = FUSED_RESNET_PICK(wgrad_finish);
  const int64_t blocks = static_cast<int64_t>(plan.blocks.size()) - 1;
  torch::stable::parallel_for(0, plan.panels * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / plan.panels, panel = i % plan.panels, k = plan.blocks[b];
      finish(g, args, k, plan.blocks[b + 1] - k, panel, sums + (panel * g.k + k) * g.taps * width, grid.rows,
             part_floats);
    }
  });
}

bool is_vector(const std::optional<Tensor>& t, int64_t size) {
  return !t || (t->dim() == 1 && t->scalar_type() == ScalarType::Float && t->numel() == size && t->is_contiguous());
}

WgradShape checked_shape(const Tensor& dy, const Tensor& x, const std::vector<int64_t>& geometry,
                         const Tensor& dweight) {
  STD_TORCH_CHECK(dy.dim() == 4 && x.dim() == 4 && dweight.dim() == 4, "conv_wgrad: dy, x and dweight must be 4-d");
  for (const Tensor* t : {&dy, &x, static_cast<const Tensor*>(&dweight)})
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float, "conv_wgrad: dy, x and dweight must be fp32");
  STD_TORCH_CHECK(is_channels_last(dy) && is_channels_last(x), "conv_wgrad: dy and x must be dense channels_last");
  STD_TORCH_CHECK(geometry.size() == 8, "conv_wgrad: geometry is kernel, stride, padding and dilation");
  for (int i = 0; i < 8; ++i)
    STD_TORCH_CHECK(geometry[i] >= (i / 2 == 2 ? 0 : 1), "conv_wgrad: geometry out of range");
  const auto in = x.sizes(), out = dy.sizes(), size = dweight.sizes();
  WgradShape g{};
  g.n = in[0], g.c = in[1], g.h = in[2], g.w = in[3], g.k = out[1], g.p = out[2], g.q = out[3];
  g.r = geometry[0], g.s = geometry[1], g.stride_h = geometry[2], g.stride_w = geometry[3];
  g.pad_h = geometry[4], g.pad_w = geometry[5], g.dilation_h = geometry[6], g.dilation_w = geometry[7];
  const auto fits = [](int64_t n, int64_t pad, int64_t dilation, int64_t taps, int64_t step, int64_t out) {
    const int64_t room = n + 2 * pad - dilation * (taps - 1) - 1;
    return room >= 0 && out == room / step + 1;
  };
  STD_TORCH_CHECK(out[0] == in[0] && x.numel() > 0 && dy.numel() > 0 &&
                      fits(g.h, g.pad_h, g.dilation_h, g.r, g.stride_h, g.p) &&
                      fits(g.w, g.pad_w, g.dilation_w, g.s, g.stride_w, g.q),
                  "conv_wgrad: x or dy is empty, or dy has the wrong size");
  STD_TORCH_CHECK(size[0] == g.k && size[1] == g.c && size[2] == g.r && size[3] == g.s,
                  "conv_wgrad: dweight must be [K, C, R, S]");
  return g;
}

}  // namespace

void conv_wgrad(const Tensor& dy, const Tensor& x, const std::optional<Tensor>& mean, const std::optional<Tensor>& var,
                const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps, int64_t act,
                std::vector<int64_t> geometry, Tensor dweight) {
  WgradShape g = checked_shape(dy, x, geometry, dweight);
  STD_TORCH_CHECK(act >= kNone && act <= kSilu, "conv_wgrad: no such activation");
  STD_TORCH_CHECK(mean.has_value() == var.has_value() && (mean || (!weight && !bias)),
                  "conv_wgrad: mean and var come together, weight and bias with them");
  STD_TORCH_CHECK(is_vector(mean, g.c) && is_vector(var, g.c) && is_vector(weight, g.c) && is_vector(bias, g.c),
                  "conv_wgrad: mean, var, weight and bias must be fp32 [C]");
  set_layout(g);
  const auto floats = [](const std::optional<Tensor>& t) { return static_cast<const float*>(data_or_null(t)); };
  const int64_t padded = ceil_div(g.c, panel_width()) * panel_width();
  std::vector<float> norm(mean ? 3 * padded : 0);
  for (int64_t c = 0; mean && c < g.c; ++c) {
    norm[c] = floats(mean)[c];
    norm[padded + c] =
        static_cast<float>((weight ? floats(weight)[c] : 1.0f) / std::sqrt(static_cast<double>(floats(var)[c]) + eps));
    norm[2 * padded + c] = bias ? floats(bias)[c] : 0.0f;
  }
  const auto stride = dweight.strides();
  const float* vectors = mean ? norm.data() : nullptr;
  run(g, {floats(dy),
          floats(x),
          vectors,
          mean ? vectors + padded : nullptr,
          mean ? vectors + 2 * padded : nullptr,
          static_cast<int>(act),
          static_cast<float*>(dweight.mutable_data_ptr()),
          {stride[0], stride[1], stride[2], stride[3]}});
}

}  // namespace fused_resnet::cpu
