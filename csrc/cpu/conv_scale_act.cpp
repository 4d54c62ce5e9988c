#include "cpu/conv_scale_act.h"

#include <algorithm>
#include <cstring>

#include "cpu/conv.h"
#include "cpu/conv_amx.h"
#include "cpu/conv_avx512.h"
#include "cpu/conv_band.h"
#include "cpu/cpu.h"
#include "cpu/memory.h"

namespace fused_resnet::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBandBytes = 768 << 10;  // of the 2 MB of L2; two panels of weights take up to as much again

// Depth and number of the taps that the kernels see; the packed weights depend on nothing else.
void set_depth(ConvShape& g) {
  g.fold = g.s > 1 && g.s * g.c <= kFoldLimit && g.c < 16;
  const int64_t depth = g.fold ? g.s * g.c : g.c;
  g.channels = g.element == 2 ? (depth + 31) / 32 * 32 : depth;
  g.taps = g.fold ? g.r : g.r * g.s;
}

bool has_kernel(int64_t element) {
  return isa() >= (element == 4 ? Isa::kAvx512 : Isa::kAmx);
}

// Where weight [k, c, r, s] lies in the packed tensor.
int64_t packed_index(const ConvShape& g, int64_t k, int64_t c, int64_t r, int64_t s) {
  const int64_t tap = g.fold ? r : r * g.s + s, depth = g.fold ? s * g.c + c : c, lane = k % kPanel;
  const int64_t panel = k / kPanel;
  if (g.element == 4) return ((panel * g.taps + tap) * g.channels + depth) * kPanel + lane;
  const int64_t tile = ((panel * g.channels / 32 + depth / 32) * g.taps + tap) * 2 + lane / 16;
  return ((tile * 16 + depth % 32 / 2) * 16 + lane % 16) * 2 + depth % 2;
}

template <class T>
void pack(const ConvShape& g, const T* weight, const int64_t* stride, T* packed) {
  const int64_t panel = g.panel_bytes() / g.element;
  torch::stable::parallel_for(0, g.panels(), 1, [&](int64_t begin, int64_t end) {
    std::memset(packed + begin * panel, 0, (end - begin) * g.panel_bytes());
    int64_t lane_offset[kPanel];
    for (int64_t lane = 0; lane < kPanel; ++lane)
      lane_offset[lane] = packed_index(g, lane, 0, 0, 0);
    // Lanes innermost: they are written side by side, and read in kPanel streams that each run on.
    for (int64_t first = begin * kPanel; first < std::min(g.k, end * kPanel); first += kPanel) {
      const int64_t lanes = std::min(kPanel, g.k - first);
      for (int64_t c = 0; c < g.c; ++c)
        for (int64_t r = 0; r < g.r; ++r)
          for (int64_t s = 0; s < g.s; ++s) {
            T* to = packed + packed_index(g, first, c, r, s);
            const T* from = weight + first * stride[0] + c * stride[1] + r * stride[2] + s * stride[3];
            for (int64_t lane = 0; lane < lanes; ++lane)
              to[lane_offset[lane]] = from[lane * stride[0]];
          }
    }
  });
}

#if defined(__x86_64__)
// Threads form a grid: `channel_parts` share the output channels, the others the output pixels.
struct Split {
  int64_t threads, channel_parts;
};

Split split(const ConvShape& g, const Layout& layout, int64_t units) {
  const double work = 2.0 * g.n * g.p * g.q * g.panels() * kPanel * g.taps * g.channels;
  const double rate = g.element == 4 ? 1.5e11 : 1.5e12, bandwidth = 2e10;  // of one core; only their ratio matters
  const double in_bytes = 1.0 * g.n * g.h * g.w * g.c * g.element, weight_bytes = 1.0 * g.panels() * g.panel_bytes();
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), 1 + work / 1e6);
  Split best{1, 1};
  double least = -1;
  for (int64_t parts = 1; parts <= threads; ++parts) {
    if (threads % parts != 0) continue;
    const int64_t others = threads / parts;
    const double share = 1.0 * ceil_div(g.panels(), parts) / g.panels() * ceil_div(units, others) / units;
    const double cost = work * share / rate + (in_bytes / others + weight_bytes / parts) / bandwidth;
    if (least < 0 || cost < least) best = {threads, parts}, least = cost;
  }
  return best;
}

template <class Kernel>
void run(const ConvShape& g, const ConvArgs& args) {
  const Layout layout(g);
  constexpr int64_t kPair = 2 * Kernel::kMaxTile;
  const int64_t pixels = g.n * g.p * g.q;
  const int64_t unit = layout.direct ? kPair : 1;  // pixels, or rows
  const int64_t units = layout.direct ? ceil_div(pixels, kPair) : g.n * g.p;
  const int64_t unit_bytes = layout.direct ? kPair * layout.pixel_stride : layout.row_bytes();
  const Split grid = split(g, layout, units);
  const int64_t pixel_parts = grid.threads / grid.channel_parts;
  const Kernel kernel{g, args};
  torch::stable::parallel_for(0, grid.threads, 1, [&](int64_t task, int64_t last_task) {
    thread_local Scratch scratch;
    Kernel::begin_thread();
    for (; task < last_task; ++task) {
      const int64_t part = task % grid.channel_parts, row = task / grid.channel_parts;
      const int64_t panel_begin = g.panels() * part / grid.channel_parts;
      const int64_t panel_end = g.panels() * (part + 1) / grid.channel_parts;
      const int64_t begin = units * row / pixel_parts, count = units * (row + 1) / pixel_parts - begin;
      if (panel_begin == panel_end || count == 0) continue;
      BandBuilder<Kernel::kMaxTile> builder(g, layout, scratch);
      const int64_t bands = std::min(count, ceil_div(count * unit_bytes, kBandBytes));
      for (int64_t i = 0; i < bands; ++i) {
        const int64_t from = (begin + count * i / bands) * unit, to = (begin + count * (i + 1) / bands) * unit;
        kernel.run(layout.direct ? builder.pixels(args.x, from, std::min(to, pixels)) : builder.rows(args.x, from, to),
                   panel_begin, panel_end);
      }
    }
    Kernel::end_thread();
  });
}
#endif

bool same_shape(const Tensor& a, const Tensor& b) {
  const auto x = a.sizes(), y = b.sizes();
  return a.scalar_type() == b.scalar_type() && x.size() == y.size() && std::equal(x.begin(), x.end(), y.begin());
}

}  // namespace

bool conv_supported(int64_t dtype_bits) {
  return (dtype_bits == 32 || dtype_bits == 16) && has_kernel(dtype_bits / 8);
}

Tensor conv_pack(const Tensor& weight, bool lasting) {
  STD_TORCH_CHECK(weight.dim() == 4, "conv_pack: weight must be [K, C, R, S]");
  const bool fp32 = weight.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(fp32 || weight.scalar_type() == ScalarType::BFloat16, "conv_pack: weight must be fp32 or bf16");
  const auto size = weight.sizes(), stride = weight.strides();
  ConvShape g{};
  g.k = size[0], g.c = size[1], g.r = size[2], g.s = size[3], g.element = fp32 ? 4 : 2;
  set_depth(g);
  const int64_t bytes = g.panels() * g.panel_bytes();
  const Tensor packed = empty_packed(bytes / g.element, weight.scalar_type(), lasting);
  const int64_t strides[] = {stride[0], stride[1], stride[2], stride[3]};
  if (fp32)
    pack(g, static_cast<const uint32_t*>(weight.const_data_ptr()), strides,
         static_cast<uint32_t*>(packed.mutable_data_ptr()));
  else
    pack(g, static_cast<const uint16_t*>(weight.const_data_ptr()), strides,
         static_cast<uint16_t*>(packed.mutable_data_ptr()));
  return packed;
}

void conv_scale_act(const Tensor& x, const Tensor& packed, const Tensor& scale, const Tensor& shift,
                    const std::optional<Tensor>& residual, std::vector<int64_t> geometry, int64_t act, Tensor out) {
  STD_TORCH_CHECK(x.dim() == 4 && out.dim() == 4 && is_channels_last(x) && is_channels_last(out),
                  "conv_scale_act: x and out must be dense channels_last");
  const bool fp32 = x.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK((fp32 || x.scalar_type() == ScalarType::BFloat16) && x.scalar_type() == out.scalar_type() &&
                      x.scalar_type() == packed.scalar_type() && has_kernel(fp32 ? 4 : 2),
                  "conv_scale_act: no kernel for this dtype on this processor");
  STD_TORCH_CHECK(geometry.size() == 8, "conv_scale_act: geometry is kernel, stride, padding and dilation");
  for (int i = 0; i < 8; ++i)
    STD_TORCH_CHECK(geometry[i] >= (i / 2 == 2 ? 0 : 1), "conv_scale_act: geometry out of range");
  const auto in = x.sizes(), size = out.sizes();
  ConvShape g{in[0],   in[1],       in[2],       in[3],       size[1],     geometry[0], geometry[1], size[2],
              size[3], geometry[2], geometry[3], geometry[4], geometry[5], geometry[6], geometry[7], fp32 ? 4 : 2};
  set_depth(g);
  const auto extent = [](int64_t n, int64_t pad, int64_t dil, int64_t taps, int64_t step) {
    return (n + 2 * pad - dil * (taps - 1) - 1) / step + 1;
  };
  STD_TORCH_CHECK(in[0] == size[0] && g.c > 0 && g.p == extent(g.h, g.pad_h, g.dilation_h, g.r, g.stride_h) &&
                      g.q == extent(g.w, g.pad_w, g.dilation_w, g.s, g.stride_w),
                  "conv_scale_act: x has no channels or out the wrong size");
  STD_TORCH_CHECK(packed.numel() * g.element == g.panels() * g.panel_bytes(), "conv_scale_act: packed does not fit");
  STD_TORCH_CHECK(scale.scalar_type() == ScalarType::Float && shift.scalar_type() == ScalarType::Float &&
                      scale.numel() == g.k && shift.numel() == g.k && scale.is_contiguous() && shift.is_contiguous(),
                  "conv_scale_act: scale and shift must be fp32 [K]");
  STD_TORCH_CHECK(!residual || (same_shape(*residual, out) && is_channels_last(*residual)),
                  "conv_scale_act: residual must be like out");
  if (out.numel() == 0) return;
  if (g.r * g.s * g.stride_h * g.stride_w == 1 && g.pad_h + g.pad_w == 0) {
    // One tall image: rows and tiles then run on from image to image.
    g.h = g.p = g.n * g.h;
    g.n = 1;
  }
  [[maybe_unused]] const ConvArgs args{static_cast<const char*>(x.const_data_ptr()),
                                       static_cast<const char*>(packed.const_data_ptr()),
                                       static_cast<const float*>(scale.const_data_ptr()),
                                       static_cast<const float*>(shift.const_data_ptr()),
                                       residual ? static_cast<const char*>(residual->const_data_ptr()) : nullptr,
                                       static_cast<char*>(out.mutable_data_ptr()),
                                       act};
#if defined(__x86_64__)
  fp32 ? run<Avx512Kernel>(g, args) : run<AmxKernel>(g, args);
#endif
}

}  // namespace fused_resnet::cpu
