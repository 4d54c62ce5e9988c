// The passes of bn_act on one tile of rows x channels. Read by per_isa.h inside the namespace of each instruction set.
// Rows are taken kGroup at a time and channels kLanes at a time: a group reads whole cache lines of consecutive rows,
// keeps them in registers, and touches the per-channel vectors once.

constexpr int kGroup = 8;
constexpr int kMergeBlock = 64;

template <int kRows, class Body>
inline void for_channels(std::int64_t row, const BnTile& tile, Body body) {
  std::int64_t c = 0;
  for (; c + kLanes <= tile.channels; c += kLanes)
    body.template operator()<kRows, kLanes>(row, tile.channel + c);
  if constexpr (kLanes > 4)
    for (; c + 4 <= tile.channels; c += 4)
      body.template operator()<kRows, 4>(row, tile.channel + c);
  for (; c < tile.channels; ++c)
    body.template operator()<kRows, 1>(row, tile.channel + c);
}

// Calls body<kRows, kN>(row, channel) over the tile.
template <class Body>
inline void for_groups(const BnTile& tile, Body body) {
  const std::int64_t end = tile.row + tile.rows;
  std::int64_t row = tile.row;
  for (; row + kGroup <= end; row += kGroup)
    for_channels<kGroup>(row, tile, body);
  for (; row < end; ++row)
    for_channels<1>(row, tile, body);
}

// total[c] + low[c] = sum of d and m2[c] = sum of (d - mean of d)^2 over the tile, d = x - centre in fp32. The rows of
// a group give their own sum and squared deviations in registers; Chan's formula merges those into the running ones.
// low gathers what each addition to total rounded away, so that the mean is as good as one summed in fp64.
template <class T>
void bn_statistics_tile(const BnActArgs& args, const BnTile& tile, float* total, float* low, float* m2) {
  const T* x = static_cast<const T*>(args.x);
  const float* centre = args.centre;
  const std::int64_t stride = args.channels, first = tile.row;
  for (std::int64_t c = tile.channel; c < tile.channel + tile.channels; ++c)
    total[c] = low[c] = m2[c] = 0.0f;
  for_groups(tile, [=]<int kRows, int kN>(std::int64_t row, std::int64_t c) {
    const float before = static_cast<float>(row - first);
    const float inverse = before > 0.0f ? 1.0f / before : 0.0f;
    const float weight = before * kRows / (before + kRows);
    const Vec<kN> origin = load<kN>(centre + c);
    Vec<kN> d[kRows], sum{}, squares{};
    for (int i = 0; i < kRows; ++i) {
      d[i] = load<kN>(x + (row + i) * stride + c) - origin;
      sum += d[i];
    }
    const Vec<kN> mean = sum * (1.0f / kRows);
    for (int i = 0; i < kRows; ++i)
      squares += (d[i] - mean) * (d[i] - mean);
    const Vec<kN> old = load<kN>(total + c), now = old + sum, added = now - old, delta = mean - old * inverse;
    store<kN>(total + c, now);
    store<kN>(low + c, load<kN>(low + c) + ((old - (now - added)) + (sum - added)));
    store<kN>(m2 + c, load<kN>(m2 + c) + squares + delta * delta * weight);
  });
}

inline void bn_statistics(const BnActArgs& args, const BnTile& tile, float* total, float* low, float* m2) {
  args.bf16 ? bn_statistics_tile<Bf16>(args, tile, total, low, m2)
            : bn_statistics_tile<float>(args, tile, total, low, m2);
}

// Merges the tiles' (total, low, m2), `count` of them `stride` floats apart and all but the last of `tile_rows` rows,
// in the order of the rows and in fp64, for n <= kMergeBlock channels.
inline void bn_merge_statistics(const float* total, const float* low, const float* m2, std::int64_t count,
                                std::int64_t stride, std::int64_t tile_rows, std::int64_t rows, int n, double* out_mean,
                                double* out_m2) {
  for (int c = 0; c < n; ++c)
    out_mean[c] = out_m2[c] = 0.0;
  for (std::int64_t t = 0; t < count; ++t) {
    const std::int64_t before = t * tile_rows;
    const double here = static_cast<double>(t + 1 < count ? tile_rows : rows - before), inverse = 1.0 / here;
    const MergeWeights<double> weights(static_cast<double>(before), here);
    for (int c = 0; c < n; ++c) {
      const double sum = static_cast<double>(total[t * stride + c]) + low[t * stride + c];
      weights.merge(out_mean[c], out_m2[c], sum * inverse - out_mean[c], m2[t * stride + c]);
    }
  }
}

// out = act((x - centre) * scale + shift + residual)
template <class T, int kAct, bool kStream>
void bn_apply_tile(const BnActArgs& args, const BnTile& tile) {
  const T* x = static_cast<const T*>(args.x);
  const T* residual = static_cast<const T*>(args.residual);
  T* out = static_cast<T*>(args.out);
  const float *centre = args.centre, *scale = args.scale, *shift = args.shift;
  const std::int64_t stride = args.channels;
  for_groups(tile, [=]<int kRows, int kN>(std::int64_t row, std::int64_t c) {
    const Vec<kN> m = load<kN>(centre + c), s = load<kN>(scale + c), b = load<kN>(shift + c);
    for (int i = 0; i < kRows; ++i) {
      const std::int64_t at = (row + i) * stride + c;
      Vec<kN> v = batch_norm<Vec<kN>>(load<kN>(x + at) - m, s, b);
      if (residual) v += load<kN>(residual + at);
      put<kStream, kN>(out + at, activate<kAct>(v));
    }
  });
  if constexpr (kStream) stream_fence();
}

inline void bn_apply(const BnActArgs& args, const BnTile& tile) {
  with_types(args.bf16, args.act, [&]<class T, int kAct>() {
    if constexpr (kCanStream<T>)
      if (args.stream) return bn_apply_tile<T, kAct, true>(args, tile);
    bn_apply_tile<T, kAct, false>(args, tile);
  });
}

// g = dy * act'(pre-activation) at element `at` of channel c; `centred` is x - centre there. kReadOutput tells ReLU and
// ReLU6 from y. Otherwise the pre-activation is computed again, by the very operations of bn_apply_tile and rounded as
// y was, so that the mask is the same to the bit.
template <class T, int kAct, bool kReadOutput, int kN>
inline Vec<kN> bn_gradient(const BnActArgs& args, std::int64_t at, std::int64_t c, Vec<kN> centred) {
  const Vec<kN> dy = load<kN>(static_cast<const T*>(args.dy) + at);
  if constexpr (kAct == kNone) return dy;
  if constexpr (kReadOutput) return activate_grad<kAct>(dy, load<kN>(static_cast<const T*>(args.y) + at));
  Vec<kN> pre = batch_norm<Vec<kN>>(centred, load<kN>(args.scale + c), load<kN>(args.shift + c));
  if (args.residual) pre += load<kN>(static_cast<const T*>(args.residual) + at);
  if constexpr (kAct == kRelu || kAct == kRelu6) {
    T rounded[kN];
    store<kN>(rounded, pre);
    pre = load<kN>(rounded);
  }
  return activate_grad<kAct>(dy, pre);
}

// sum_g[c] = sum of g, sum_gx[c] = sum of g * (x - centre) over the tile, in fp32 from group to group; dresidual = g.
template <class T, int kAct, bool kReadOutput>
void bn_reduce_tile(const BnActArgs& args, const BnTile& tile, float* sum_g, float* sum_gx) {
  const T* x = static_cast<const T*>(args.x);
  T* dresidual = static_cast<T*>(args.dresidual);
  const std::int64_t stride = args.channels;
  for (std::int64_t c = tile.channel; c < tile.channel + tile.channels; ++c)
    sum_g[c] = sum_gx[c] = 0.0f;
  for_groups(tile, [=, in = args]<int kRows, int kN>(std::int64_t row, std::int64_t c) {
    const Vec<kN> m = load<kN>(in.centre + c);
    Vec<kN> g_total{}, gx_total{};
    for (int i = 0; i < kRows; ++i) {
      const std::int64_t at = (row + i) * stride + c;
      const Vec<kN> centred = load<kN>(x + at) - m;
      const Vec<kN> g = bn_gradient<T, kAct, kReadOutput, kN>(in, at, c, centred);
      if (dresidual) store<kN>(dresidual + at, g);
      g_total += g;
      gx_total += g * centred;
    }
    store<kN>(sum_g + c, load<kN>(sum_g + c) + g_total);
    store<kN>(sum_gx + c, load<kN>(sum_gx + c) + gx_total);
  });
}

inline void bn_reduce(const BnActArgs& args, const BnTile& tile, float* sum_g, float* sum_gx) {
  with_types(args.bf16, args.act, [&]<class T, int kAct>() {
    if constexpr (kAct == kRelu || kAct == kRelu6)
      if (args.y) return bn_reduce_tile<T, kAct, true>(args, tile, sum_g, sum_gx);
    bn_reduce_tile<T, kAct, false>(args, tile, sum_g, sum_gx);
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

// dx = scale * (g - mean_g - (x - centre) * slope)
template <class T, int kAct, bool kReadOutput, bool kStream>
void bn_input_grad_tile(const BnActArgs& args, const BnTile& tile) {
  const T* x = static_cast<const T*>(args.x);
  T* dx = static_cast<T*>(args.out);
  const std::int64_t stride = args.channels;
  for_groups(tile, [=, in = args]<int kRows, int kN>(std::int64_t row, std::int64_t c) {
    const Vec<kN> m = load<kN>(in.centre + c), s = load<kN>(in.scale + c);
    const Vec<kN> mean_g = load<kN>(in.mean_g + c), slope = load<kN>(in.slope + c);
    for (int i = 0; i < kRows; ++i) {
      const std::int64_t at = (row + i) * stride + c;
      const Vec<kN> centred = load<kN>(x + at) - m;
      const Vec<kN> g = bn_gradient<T, kAct, kReadOutput, kN>(in, at, c, centred);
      put<kStream, kN>(dx + at, batch_norm_grad<Vec<kN>>(g, centred, s, mean_g, slope));
    }
  });
  if constexpr (kStream) stream_fence();
}

template <class T, int kAct, bool kReadOutput>
inline void bn_input_grad_from(const BnActArgs& args, const BnTile& tile) {
  if constexpr (kCanStream<T>)
    if (args.stream) return bn_input_grad_tile<T, kAct, kReadOutput, true>(args, tile);
  bn_input_grad_tile<T, kAct, kReadOutput, false>(args, tile);
}

inline void bn_input_grad(const BnActArgs& args, const BnTile& tile) {
  with_types(args.bf16, args.act, [&]<class T, int kAct>() {
    if constexpr (kAct == kRelu || kAct == kRelu6)
      if (args.y) return bn_input_grad_from<T, kAct, true>(args, tile);
    bn_input_grad_from<T, kAct, false>(args, tile);
  });
}
