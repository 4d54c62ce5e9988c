// Batch norm in training, between the statistics of bn_stats.cu: its output, and the passes of its gradient.

#include "cuda/bn_act.h"
#include "cuda/kernels.h"

namespace fused_resnet::cuda {
namespace {

enum class Residual { kNone, kAdded, kNormed };

// out = act((x - mean) * scale + shift + residual), kNormed with (residual - its mean) * its scale + its shift; bit e
// of mask[access] is set where the gradient of element e passes.
template <class T, int kN, int kAct, Residual kResidual>
__global__ void __launch_bounds__(RowGrid::kThreads, kResidual == Residual::kNone ? 3 : 2)
    bn_apply_kernel(BnArgs<T> in, RowGrid grid) {
  const RowTile tile(grid, kN, true);
  if (!tile.inside) return;
  const PreActivation<kN, kResidual == Residual::kNormed> norms(in.norm, in.residual_norm, tile);
  for_rows<RowGrid::kAtOnce>(tile, [&](std::int64_t row, auto at_once) {
    constexpr int kRows = at_once();
    Pack<T, kN> x[kRows];
    [[maybe_unused]] Pack<T, kN> residual[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const std::int64_t at = (row + i * tile.lines) * grid.channels + tile.channel;
      x[i] = load_pack<T, kN>(in.x + at);
      if constexpr (kResidual != Residual::kNone) residual[i] = load_pack<T, kN>(in.residual + at);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const std::int64_t at = (row + i * tile.lines) * grid.channels + tile.channel;
      float v[kN];
#pragma unroll
      for (int e = 0; e < kN; ++e) {
        v[e] = widen(x[i], e);
        if constexpr (kResidual == Residual::kNone)
          v[e] = norms.x(e, v[e]);
        else
          v[e] = norms(e, v[e], widen(residual[i], e));
        v[e] = limited_activate<kAct>(v[e], in.limits);
      }
      const auto out = narrow<T>(v);
      store_global(in.out + at, out);
      if (!in.mask) continue;
      unsigned bits = 0;
#pragma unroll
      for (int e = 0; e < kN; ++e)
        bits |= static_cast<unsigned>(passes(widen(out, e), in.limits)) << e;
      in.mask[at / kN] = static_cast<std::uint8_t>(bits);
    }
  });
}

// Calls body(integral constant) with kNone for the activations that clamp, else with the activation.
template <class Body>
void with_limited_act(std::int64_t act, const Body& body) {
  if (act == kHardswish) return body(std::integral_constant<int, kHardswish>{});
  if (act == kSilu) return body(std::integral_constant<int, kSilu>{});
  STD_TORCH_CHECK(act == kNone || act == kRelu || act == kRelu6, "unknown activation");
  body(std::integral_constant<int, kNone>{});
}

std::uint8_t* mask_bytes(const std::optional<Tensor>& mask) {
  return mask ? static_cast<std::uint8_t*>(mask->mutable_data_ptr()) : nullptr;
}

void check_mask(const Arguments& args, const std::optional<Tensor>& mask, const Tensor& x, std::int64_t act) {
  if (!mask) return;
  if (act == kHardswish || act == kSilu) args.refuse("mask", "given", "None: it tells only the slope of a clamp");
  const std::int64_t wide = 16 / x.element_size(), width = x.size(1) % wide ? 1 : wide;
  args.matrix(*mask, ScalarType::Byte, 1, x.numel() / width, "mask", 1);
}

// What both passes of the backward are given.
struct Gradient {
  Tensor dy;
  Normed source;
  std::int64_t act;
  std::optional<Tensor> y, mask;

  void check(const Arguments& args) const {
    source.check(args);
    args.like(dy, source.x, "dy");
    args.activation(act);
    args.like(y, source.x, "y");
    check_mask(args, mask, source.x, act);
  }
};

// Launches `in`'s pass of the backward over dy, with the slope from where it is cheapest.
template <int kN, bool kNormed, class T>
void launch_backward(const Launcher& launch, const BnArgs<T>& in, std::int64_t act, const RowGrid& grid) {
  const StoredGradient<T, kN> source{in.dy};
  if (act == kNone) return launch_bn_backward<kN, Slope::kOne, kNone, kNormed>(launch, in, source, grid);
  if (in.mask) return launch_bn_backward<kN, Slope::kMask, kNone, kNormed>(launch, in, source, grid);
  with_limited_act(act, [&](auto code) {
    if constexpr (code() == kNone)
      if (in.y) return launch_bn_backward<kN, Slope::kOutput, kNone, kNormed>(launch, in, source, grid);
    launch_bn_backward<kN, Slope::kAgain, code(), kNormed>(launch, in, source, grid);
  });
}

// Launches the pass that `finish(in)` makes of it; without tile_rows, one that leaves nothing behind for each tile.
template <class Finish>
void backward(const Gradient& gradient, std::int64_t tile_rows, const Finish& finish) {
  const Tensor& x = gradient.source.x;
  const Launcher launch(x);
  with_dtype(x, [&](auto t) {
    using T = decltype(t);
    with_width<T>(x.size(1), [&](auto width) {
      auto in = bn_args<T>(gradient.source, gradient.act);
      in.dy = static_cast<const T*>(gradient.dy.const_data_ptr());
      in.y = static_cast<const T*>(data_or_null(gradient.y));
      in.mask = mask_bytes(gradient.mask);
      finish(in);
      const RowGrid grid(x.numel() / x.size(1), x.size(1), width(), tile_rows);
      gradient.source.has_residual_norm() ? launch_backward<width(), true>(launch, in, gradient.act, grid)
                                          : launch_backward<width(), false>(launch, in, gradient.act, grid);
    });
  });
}

void apply(const Normed& source, std::int64_t act, const Tensor& out, const std::optional<Tensor>& mask) {
  const Tensor& x = source.x;
  const Launcher launch(x);
  with_dtype(x, [&](auto t) {
    using T = decltype(t);
    with_width<T>(x.size(1), [&](auto width) {
      auto in = bn_args<T>(source, act);
      write_to(in.out, out);
      in.mask = mask_bytes(mask);
      const RowGrid grid(x.numel() / x.size(1), x.size(1), width());
      with_limited_act(act, [&](auto code) {
        const auto kernel = source.has_residual_norm() ? bn_apply_kernel<T, width(), code(), Residual::kNormed>
                            : source.residual          ? bn_apply_kernel<T, width(), code(), Residual::kAdded>
                                                       : bn_apply_kernel<T, width(), code(), Residual::kNone>;
        launch(kernel, grid.blocks(), RowGrid::kThreads, 0, in, grid);
      });
    });
  });
}

}  // namespace

void bn_apply(Tensor x, Tensor mean, Tensor var, std::optional<Tensor> weight, std::optional<Tensor> bias, double eps,
              std::optional<Tensor> residual, std::optional<Tensor> residual_mean, std::optional<Tensor> residual_var,
              std::optional<Tensor> residual_weight, std::optional<Tensor> residual_bias, double residual_eps,
              std::int64_t act, Tensor y, std::optional<Tensor> mask) {
  const Norm residual_norm{residual_mean, residual_var, residual_weight, residual_bias, residual_eps};
  const Normed source{x, {mean, var, weight, bias, eps}, residual, residual_norm};
  const Arguments args("bn_apply", x);
  source.check(args);
  args.activation(act);
  args.like(y, x, "y");
  check_mask(args, mask, x, act);
  apply(source, act, y, mask);
}

void scale_act(Tensor x, Tensor scale, Tensor shift, std::optional<Tensor> residual, std::int64_t act, Tensor out) {
  const Arguments args("scale_act", x);
  args.image(x, "x");
  args.vector(scale, x.size(1), "scale");
  args.vector(shift, x.size(1), "shift");
  args.like(residual, x, "residual");
  args.activation(act);
  args.like(out, x, "out");
  apply({.x = x, .norm = {.weight = scale, .bias = shift}, .residual = residual}, act, out, std::nullopt);
}

void bn_reduce(Tensor dy, Tensor x, Tensor mean, Tensor var, std::optional<Tensor> weight, std::optional<Tensor> bias,
               double eps, std::optional<Tensor> residual, std::optional<Tensor> residual_mean,
               std::optional<Tensor> residual_var, std::optional<Tensor> residual_weight,
               std::optional<Tensor> residual_bias, double residual_eps, std::int64_t act, std::optional<Tensor> y,
               std::optional<Tensor> mask, std::int64_t tile_rows, Tensor partials, std::optional<Tensor> g) {
  const Norm residual_norm{residual_mean, residual_var, residual_weight, residual_bias, residual_eps};
  const Gradient gradient{dy, {x, {mean, var, weight, bias, eps}, residual, residual_norm}, act, y, mask};
  const Arguments args("bn_reduce", x);
  gradient.check(args);
  args.partials(partials, x, tile_rows, gradient.source.has_residual_norm() ? 3 : 2);
  args.like(g, x, "g");
  backward(gradient, tile_rows, [&](auto& in) {
    in.partials = floats(partials);
    write_to(in.out, g);
  });
}

void bn_input_grad(Tensor dy, Tensor x, Tensor mean, Tensor var, std::optional<Tensor> weight,
                   std::optional<Tensor> bias, double eps, std::optional<Tensor> residual,
                   std::optional<Tensor> residual_mean, std::optional<Tensor> residual_var,
                   std::optional<Tensor> residual_weight, std::optional<Tensor> residual_bias, double residual_eps,
                   std::int64_t act, std::optional<Tensor> y, std::optional<Tensor> mask, Tensor dweight, Tensor dbias,
                   std::optional<Tensor> dresidual_weight, double count, Tensor dx, std::optional<Tensor> dresidual) {
  const Norm residual_norm{residual_mean, residual_var, residual_weight, residual_bias, residual_eps};
  const Gradient gradient{dy, {x, {mean, var, weight, bias, eps}, residual, residual_norm}, act, y, mask};
  const ChannelGradients channels{dweight, dbias, dresidual_weight, count};
  const Arguments args("bn_input_grad", x);
  gradient.check(args);
  channels.check(args, x.size(1));
  args.like(dx, x, "dx");
  args.like(dresidual, x, "dresidual");
  if (gradient.source.has_residual_norm()) {
    args.given(dresidual_weight, "dresidual_weight", "a number for each channel beside residual_mean");
    args.given(dresidual, "dresidual", "what lies as the residual does, beside residual_mean");
  }
  backward(gradient, 0, [&](auto& in) {
    channels.hand_to(in);
    write_to(in.out, dx);
    write_to(in.dresidual, dresidual);
  });
}

}  // namespace fused_resnet::cuda
