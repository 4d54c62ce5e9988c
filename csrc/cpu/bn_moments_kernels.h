// The moments of a tile, and their merging. Read by per_isa.h inside the namespace of each instruction set.
#include "cpu/groups.h"

// total[c] + low[c] = sum of d and m2[c] = sum of (d - mean of d)^2 over the tile, d = x - centre in fp32. The rows of
// a group give their own sum and squared deviations in registers; Chan's formula merges those into the running ones.
// low gathers what each addition to total rounded away, so that the mean is as good as one summed in fp64.
template <class T>
void bn_moments_rows(const MomentsArgs& args, const Tile& tile, float* total, float* low, float* m2) {
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

inline void bn_moments_tile(const MomentsArgs& args, const Tile& tile, float* total, float* low, float* m2) {
  args.bf16 ? bn_moments_rows<Bf16>(args, tile, total, low, m2) : bn_moments_rows<float>(args, tile, total, low, m2);
}

// Merges the tiles' (total, low, m2), `count` of them `stride` floats apart and all but the last of `tile_rows` rows,
// in the order of the rows and in fp64, for n <= kMergeBlock channels.
inline void bn_merge_moments(const float* total, const float* low, const float* m2, std::int64_t count,
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
