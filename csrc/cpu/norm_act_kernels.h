// The passes of batch norm + residual + activation over one tile of rows x channels. Read by per_isa.h inside the
// namespace of each instruction set.
#include "cpu/affine.h"
#include "cpu/groups.h"
#include "cpu/max_pool_grad.h"

// The norms of kN channels from c on. kNormed: the residual has a norm of its own; else it may be there or not.
template <class T, bool kNormed, int kN>
struct NormLanes {
  const T *x, *residual;
  AffineLanes<kN> norm, residual_norm;

  NormLanes(const NormActArgs& args, std::int64_t c)
      : x(static_cast<const T*>(args.x)), residual(static_cast<const T*>(args.residual)), norm(args.norm, c) {
    if constexpr (kNormed) residual_norm = AffineLanes<kN>(args.residual_norm, c);
  }

  Vec<kN> centred(std::int64_t at) const { return load<kN>(x + at) - norm.mean; }

  Vec<kN> centred_residual(std::int64_t at) const {
    if constexpr (!kNormed) return Vec<kN>{};
    return load<kN>(residual + at) - residual_norm.mean;
  }

  Vec<kN> preactivation(std::int64_t at, Vec<kN> centred, Vec<kN> centred_residual) const {
    Vec<kN> v = norm.of_centred(centred);
    if constexpr (kNormed)
      v += residual_norm.of_centred(centred_residual);
    else if (residual)
      v += load<kN>(residual + at);
    return v;
  }
};

// out = act(norm(x) + residual), or act(norm(x) + residual_norm(residual))
template <class T, int kAct, bool kNormed, bool kStream>
void norm_act_rows(const NormActArgs& args, const Tile& tile) {
  for_groups(tile, [in = args]<int kRows, int kN>(std::int64_t row, std::int64_t c) {
    const NormLanes<T, kNormed, kN> lanes(in, c);
    for (int i = 0; i < kRows; ++i) {
      const std::int64_t at = (row + i) * in.channels + c;
      const Vec<kN> v = lanes.preactivation(at, lanes.centred(at), lanes.centred_residual(at));
      put<kStream, kN>(static_cast<T*>(in.out) + at, activate<kAct>(v));
    }
  });
  if constexpr (kStream) stream_fence();
}

// Calls body<kNormed, kStream>() as args want it.
template <class T, class Body>
inline void with_outputs(const NormActArgs& args, Body body) {
  const auto with_norm = [&]<bool kStream>() {
    args.residual_norm.mean ? body.template operator()<true, kStream>() : body.template operator()<false, kStream>();
  };
  if constexpr (kCanStream<T>)
    if (args.stream) return with_norm.template operator()<true>();
  with_norm.template operator()<false>();
}

inline void norm_act_tile(const NormActArgs& args, const Tile& tile) {
  with_types(args.bf16, args.act, [&]<class T, int kAct>() {
    with_outputs<T>(args, [&]<bool kNormed, bool kStream>() { norm_act_rows<T, kAct, kNormed, kStream>(args, tile); });
  });
}

// g = dy * act'(pre-activation) at element `at`. kReadOutput tells ReLU and ReLU6 from y. Otherwise the pre-activation
// is computed again, by the very operations of norm_act_rows and rounded as y was, so that the mask is the same to the
// bit.
template <class T, int kAct, bool kReadOutput, bool kNormed, int kN>
inline Vec<kN> norm_act_gradient(const NormActArgs& in, const NormLanes<T, kNormed, kN>& lanes, std::int64_t at,
                                 Vec<kN> centred, Vec<kN> centred_residual) {
  const Vec<kN> dy = load<kN>(static_cast<const T*>(in.dy) + at);
  if constexpr (kAct == kNone) return dy;
  if constexpr (kReadOutput) return activate_grad<kAct>(dy, load<kN>(static_cast<const T*>(in.y) + at));
  Vec<kN> pre = lanes.preactivation(at, centred, centred_residual);
  if constexpr (kAct == kRelu || kAct == kRelu6) pre = rounded<T, kN>(pre);
  return activate_grad<kAct>(dy, pre);
}

// of_g[c] = sum of g, of_x[c] = sum of g * (x - mean), of_residual[c] = sum of g * (residual - its mean) over the tile,
// in fp32 from group to group; out = g, where there is an out.
template <class T, int kAct, bool kReadOutput, bool kNormed>
void norm_act_reduce_rows(const NormActArgs& args, const Tile& tile, const GradientSums& sums) {
  for (std::int64_t c = tile.channel; c < tile.channel + tile.channels; ++c) {
    sums.of_g[c] = sums.of_x[c] = 0.0f;
    if constexpr (kNormed) sums.of_residual[c] = 0.0f;
  }
  for_groups(tile, [in = args, sums]<int kRows, int kN>(std::int64_t row, std::int64_t c) {
    const NormLanes<T, kNormed, kN> lanes(in, c);
    Vec<kN> of_g{}, of_x{}, of_residual{};
    for (int i = 0; i < kRows; ++i) {
      const std::int64_t at = (row + i) * in.channels + c;
      const Vec<kN> centred = lanes.centred(at), centred_residual = lanes.centred_residual(at);
      const Vec<kN> g = norm_act_gradient<T, kAct, kReadOutput>(in, lanes, at, centred, centred_residual);
      if (in.out) store<kN>(static_cast<T*>(in.out) + at, g);
      of_g += g;
      of_x += g * centred;
      if constexpr (kNormed) of_residual += g * centred_residual;
    }
    store<kN>(sums.of_g + c, load<kN>(sums.of_g + c) + of_g);
    store<kN>(sums.of_x + c, load<kN>(sums.of_x + c) + of_x);
    if constexpr (kNormed) store<kN>(sums.of_residual + c, load<kN>(sums.of_residual + c) + of_residual);
  });
}

// dx = scale * (g - mean_g - (x - mean) * slope), and dresidual by the same formula with kNormed.
template <class T, int kAct, bool kReadOutput, bool kNormed, bool kStream>
void norm_act_input_grad_rows(const NormActArgs& args, const Tile& tile) {
  for_groups(tile, [in = args]<int kRows, int kN>(std::int64_t row, std::int64_t c) {
    const NormLanes<T, kNormed, kN> lanes(in, c);
    const Vec<kN> mean_g = load<kN>(in.mean_g + c), slope = load<kN>(in.slope + c);
    Vec<kN> residual_slope{};
    if constexpr (kNormed) residual_slope = load<kN>(in.residual_slope + c);
    for (int i = 0; i < kRows; ++i) {
      const std::int64_t at = (row + i) * in.channels + c;
      const Vec<kN> centred = lanes.centred(at), centred_residual = lanes.centred_residual(at);
      const Vec<kN> g = norm_act_gradient<T, kAct, kReadOutput>(in, lanes, at, centred, centred_residual);
      put<kStream, kN>(static_cast<T*>(in.out) + at,
                       batch_norm_grad<Vec<kN>>(g, centred, lanes.norm.scale, mean_g, slope));
      if constexpr (kNormed)
        put<kStream, kN>(
            static_cast<T*>(in.dresidual) + at,
            batch_norm_grad<Vec<kN>>(g, centred_residual, lanes.residual_norm.scale, mean_g, residual_slope));
    }
  });
  if constexpr (kStream) stream_fence();
}

// Calls body<T, kAct, kReadOutput>() as args want it.
template <class Body>
inline void with_slope(const NormActArgs& args, Body body) {
  with_types(args.bf16, args.act, [&]<class T, int kAct>() {
    if constexpr (kAct == kRelu || kAct == kRelu6)
      if (args.y) return body.template operator()<T, kAct, true>();
    body.template operator()<T, kAct, false>();
  });
}

inline void norm_act_reduce_tile(const NormActArgs& args, const Tile& tile, const GradientSums& sums) {
  with_slope(args, [&]<class T, int kAct, bool kReadOutput>() {
    args.residual_norm.mean ? norm_act_reduce_rows<T, kAct, kReadOutput, true>(args, tile, sums)
                            : norm_act_reduce_rows<T, kAct, kReadOutput, false>(args, tile, sums);
  });
}

inline void norm_act_input_grad_tile(const NormActArgs& args, const Tile& tile) {
  with_slope(args, [&]<class T, int kAct, bool kReadOutput>() {
    with_outputs<T>(args, [&]<bool kNormed, bool kStream>() {
      norm_act_input_grad_rows<T, kAct, kReadOutput, kNormed, kStream>(args, tile);
    });
  });
}

// out[c] = sum over the tiles of partial, in the order of the rows and in fp64, for n <= kMergeBlock channels.
inline void bn_merge_sums(const float* partial, std::int64_t count, std::int64_t stride, int n, double* out) {
  for (int c = 0; c < n; ++c)
    out[c] = 0.0;
  for (std::int64_t t = 0; t < count; ++t)
    for (int c = 0; c < n; ++c)
      out[c] += partial[t * stride + c];
}
