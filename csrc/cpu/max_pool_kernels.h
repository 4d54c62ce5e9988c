// One row of outputs of a max pool. Read by per_isa.h inside the namespace of each instruction set.
#include "cpu/affine.h"
#include "cpu/groups.h"
#include "cpu/max_pool_grad.h"

// out = the largest tap of a window of rows x cols pixels from `first` on, and with kArgmax its number, `tap` being the
// first one's. The taps are those of act(norm(x)) with kNorm, rounded as they would be in memory.
template <class T, int kAct, bool kNorm, bool kArgmax, int kN>
inline void max_pool_pixel(const MaxPoolArgs& args, const T* first, std::int64_t rows, std::int64_t cols,
                           std::int64_t tap, std::int64_t c, std::int64_t out) {
  const Pool& pool = args.pool;
  AffineLanes<kN> norm;
  if constexpr (kNorm) norm = AffineLanes<kN>(args.norm, c);
  Vec<kN> best{};
  typename Lanes<kN>::Int taken{};
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t s = 0; s < cols; ++s) {
      Vec<kN> v = load<kN>(first + (r * pool.w + s) * pool.channels + c);
      if constexpr (kNorm) v = rounded<T, kN>(activate<kAct>(norm.of_centred(v - norm.mean)));
      if (r + s == 0) {
        best = v;
        taken += static_cast<std::int32_t>(tap);
      } else if constexpr (kArgmax) {
        const auto more = (v > best) | (v != v);
        best = more ? v : best;
        taken = more ? typename Lanes<kN>::Int{} + static_cast<std::int32_t>(tap + r * pool.s + s) : taken;
      } else {
        best = larger(v, best);
      }
    }
  store<kN>(static_cast<T*>(args.out) + out + c, best);
  if constexpr (kArgmax) store_bytes<kN>(args.argmax + out + c, taken);
}

template <class T, int kAct, bool kNorm, bool kArgmax>
void max_pool_row(const MaxPoolArgs& args, std::int64_t row) {
  const Pool& pool = args.pool;
  const std::int64_t n = row / pool.p, y = row % pool.p * pool.stride_h - pool.pad_h;
  const std::int64_t top = std::max<std::int64_t>(y, 0), bottom = std::min(y + pool.r, pool.h);
  const T* image = static_cast<const T*>(args.x) + n * pool.h * pool.w * pool.channels;
  std::int64_t out = row * pool.q * pool.channels;
  for (std::int64_t q = 0; q < pool.q; ++q, out += pool.channels) {
    const std::int64_t x = q * pool.stride_w - pool.pad_w;
    const std::int64_t left = std::max<std::int64_t>(x, 0), right = std::min(x + pool.s, pool.w);
    const T* first = image + (top * pool.w + left) * pool.channels;
    const std::int64_t tap = (top - y) * pool.s + left - x;
    for_lanes<1>(0, Tile{0, 1, 0, pool.channels}, [=, &args]<int, int kN>(std::int64_t, std::int64_t c) {
      max_pool_pixel<T, kAct, kNorm, kArgmax, kN>(args, first, bottom - top, right - left, tap, c, out);
    });
  }
}

inline void max_pool_of(const MaxPoolArgs& args, std::int64_t row) {
  with_types(args.bf16, args.act, [&]<class T, int kAct>() {
    if (args.norm.mean) return max_pool_row<T, kAct, true, true>(args, row);
    if constexpr (kAct == kNone)
      args.argmax ? max_pool_row<T, kAct, false, true>(args, row) : max_pool_row<T, kAct, false, false>(args, row);
  });
}
