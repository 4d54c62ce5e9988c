// Convolution in fp32 with AVX-512, and the vector code that the bf16 kernel shares with it.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "cpu/conv.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in the compiler's own intrinsics, gcc 12
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")
#endif

namespace fused_resnet::cpu {

// exp(x) to about 2 ulp: 2^n * polynomial(x - n ln 2). The operand order of max and min lets NaN through.
inline __m512 exp512(__m512 x) {
  x = _mm512_min_ps(_mm512_set1_ps(100.f), _mm512_max_ps(_mm512_set1_ps(-100.f), x));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
  __m512 y = _mm512_set1_ps(1.f / 720);
  for (float c : {1.f / 120, 1.f / 24, 1.f / 6, .5f, 1.f, 1.f})
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(y, n);
}

// none, relu and relu6, with bounds that are infinite or not. NaN passes: max and min return their second operand.
struct Clamp {
  explicit Clamp(int64_t act)
      : low(_mm512_set1_ps(act == kRelu || act == kRelu6 ? 0.f : -__builtin_inff())),
        high(_mm512_set1_ps(act == kRelu6 ? 6.f : __builtin_inff())) {}
  __m512 operator()(__m512 x) const { return _mm512_min_ps(high, _mm512_max_ps(low, x)); }
  __m512 low, high;
};

// hardswish or silu
inline __m512 activate(__m512 x, int64_t act) {
  const __m512 zero = _mm512_setzero_ps(), six = _mm512_set1_ps(6.f);
  if (act == kSilu) return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.f), exp512(_mm512_sub_ps(zero, x))));
  const __m512 gate = _mm512_min_ps(six, _mm512_max_ps(zero, _mm512_add_ps(x, _mm512_set1_ps(3.f))));
  return _mm512_mul_ps(x, _mm512_mul_ps(gate, _mm512_set1_ps(1.f / 6)));
}

// Copies `bytes` and zeroes what is left of `padded`, a multiple of 64 unless it equals `bytes`.
inline void copy_padded(char* dst, const char* src, int64_t bytes, int64_t padded) {
  int64_t i = 0;
  for (; i + kLine <= bytes; i += kLine)
    _mm512_storeu_si512(dst + i, _mm512_loadu_si512(src + i));
  if (i == padded) return;
  const __mmask64 tail = (1ull << (bytes - i)) - 1;
  if (padded == bytes) return _mm512_mask_storeu_epi8(dst + i, tail, _mm512_maskz_loadu_epi8(tail, src + i));
  _mm512_storeu_si512(dst + i, _mm512_maskz_loadu_epi8(tail, src + i));
  for (i += kLine; i < padded; i += kLine)
    _mm512_storeu_si512(dst + i, _mm512_setzero_si512());
}

// out[m, k] = act(sum_{t, c} x[m, t, c] w[t, c, k] * scale[k] + shift[k] + residual[m, k])
// for two tiles of M pixels and the 32 channels of one panel: up to 28 accumulators in fp32 registers, the weights
// streamed from L1 or L2 and each input broadcast from memory. Long sums are taken in runs, whose results are summed in
// turn: rounding grows with the square root of a run. Short runs cost some 5 % and are for small maps, where PyTorch's
// own convolution takes them too (2048 channels, 2x2: the error was 7 times PyTorch's, and is 1.05 of it).
struct Avx512Kernel {
  static constexpr int64_t kMaxTile = 7;
  static constexpr int64_t kSmallMap = 16, kShortRun = 128, kRun = 512;

  const ConvShape& shape;
  const ConvArgs& args;

  struct Panel {
    const float* weight;
    const char* next;    // what comes next is fetched to L2 while this one computes: weights of the following panel,
    int64_t next_step;   // or the input and output of the following tiles; so many bytes for each channel
    __mmask16 lanes[2];  // channels that exist
    int64_t k0;
  };

  static void begin_thread() {}
  static void end_thread() {}

  void run(const Band& band, int64_t panel_begin, int64_t panel_end) const {
    const int64_t passes = (band.num_tiles + 1) / 2;
    const bool few = few_at_once(shape, band, panel_end - panel_begin);
    const int64_t group = few ? 1 : passes;
    const int64_t spread = group >= 8 ? 8 : group >= 4 ? 4 : group >= 2 ? 2 : 1;  // passes that fetch
    for (int64_t first = 0; first < passes; first += group)
      for (int64_t j = panel_begin; j < panel_end; ++j) {
        const int64_t left = shape.k - j * kPanel;
        const char* weight = args.weight + j * shape.panel_bytes();
        Panel panel{reinterpret_cast<const float*>(weight), weight, 0, {}, j * kPanel};
        panel.lanes[0] = left >= 16 ? 0xffff : (1u << left) - 1;
        panel.lanes[1] = left >= 32 ? 0xffff : left > 16 ? (1u << (left - 16)) - 1 : 0;
        if (few) fetch_next_tiles(band, first + 1, j - panel_begin, panel);
        for (int64_t i = first; i < first + group; ++i) {
          if (!few) {
            const bool fetch = j + 1 < panel_end && i < spread;
            panel.next = fetch ? weight + shape.panel_bytes() + i * shape.panel_bytes() / spread : weight;
            panel.next_step = fetch ? 2 * kLine / spread : 0;
          }
          const bool pair = 2 * i + 1 < band.num_tiles;
          (pair ? kTable2 : kTable1)[band.tile_rows](*this, band, band.tiles + 2 * i, panel);
        }
      }
  }

 private:
  using Fn = void (*)(const Avx512Kernel&, const Band&, const Tile*, const Panel&);

  // Gives panel number `turn` its part, a line for each channel, of what the tiles of another pass read and write.
  void fetch_next_tiles(const Band& band, int64_t pass, int64_t turn, Panel& panel) const {
    if (2 * pass + 1 >= band.num_tiles) return;
    const Tile* tiles = band.tiles + 2 * pass;
    const int64_t part = shape.channels * kLine, pixel = shape.k * int64_t{sizeof(float)};
    const int64_t in_parts = ceil_div(2 * band.tile_rows * band.pixel_stride, part);
    const int64_t out_parts = ceil_div((tiles[1].out - tiles[0].out + band.tile_rows) * pixel, part);
    const bool apart = args.residual && args.residual != args.out;
    const char* from = nullptr;
    if (turn < in_parts)
      from = band.base + tiles[0].in;
    else if ((turn -= in_parts) < out_parts)
      from = args.out + tiles[0].out * pixel;
    else if ((turn -= out_parts) < out_parts && apart)
      from = args.residual + tiles[0].out * pixel;
    if (from) panel.next = from + turn * part, panel.next_step = kLine;
  }

  template <int M, int kTiles>
  static void compute(const Avx512Kernel& self, const Band& band, const Tile* tiles, const Panel& panel) {
    __m512 acc[kTiles][M][2], total[kTiles][M][2];
    zero(acc);
    self.prefetch_tiles<M, kTiles>(tiles, panel);
    int64_t offset[M];
    for (int m = 0; m < M; ++m)
      offset[m] = m * band.pixel_stride;
    const float* w = panel.weight;
    const char* next = panel.next;
    const int64_t longest = self.shape.p * self.shape.q <= kSmallMap ? kShortRun : kRun;
    int64_t run = longest;
    bool several = false;
    for (int64_t tap = 0; tap < self.shape.taps; ++tap) {
      const char* a = band.base + tiles[0].in + band.tap_offset[tap];
      const char* b = band.base + tiles[kTiles - 1].in + band.tap_offset[tap];
      for (int64_t left = self.shape.channels; left > 0;) {
        const int64_t count = std::min(left, run);
        for (int64_t c = count; c > 0; --c) {
          const __m512 w0 = _mm512_loadu_ps(w), w1 = _mm512_loadu_ps(w + 16);
          __builtin_prefetch(next, 0, 2);
#pragma GCC unroll 16
          for (int t = 0; t < kTiles; ++t)
#pragma GCC unroll 16
            for (int m = 0; m < M; ++m) {
              const __m512 x = _mm512_set1_ps(*reinterpret_cast<const float*>((t ? b : a) + offset[m]));
              acc[t][m][0] = _mm512_fmadd_ps(x, w0, acc[t][m][0]);
              acc[t][m][1] = _mm512_fmadd_ps(x, w1, acc[t][m][1]);
            }
          w += kPanel;
          next += panel.next_step;
          a += sizeof(float);
          b += sizeof(float);
          // Hidden from the optimiser, which would keep one pointer for each pixel and run out of registers.
          __asm__("" : "+r"(a), "+r"(b));
        }
        left -= count;
        run -= count;
        if (run == 0) {
          if (!several) zero(total);
          add(total, acc);
          zero(acc);
          several = true;
          run = longest;
        }
      }
    }
    if (several) add(acc, total);
    self.store<M, kTiles>(acc, tiles, panel);
  }

  template <int M, int kTiles>
  static void zero(__m512 (&acc)[kTiles][M][2]) {
#pragma GCC unroll 16
    for (int t = 0; t < kTiles; ++t)
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m)
        acc[t][m][0] = acc[t][m][1] = _mm512_setzero_ps();
  }

  template <int M, int kTiles>
  static void add(__m512 (&to)[kTiles][M][2], const __m512 (&from)[kTiles][M][2]) {
#pragma GCC unroll 16
    for (int t = 0; t < kTiles; ++t)
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m)
        for (int v = 0; v < 2; ++v)
          to[t][m][v] = _mm512_add_ps(to[t][m][v], from[t][m][v]);
  }

  // The residual and the output are wanted after the loop; each is a strided walk that the hardware does not foresee.
  template <int M, int kTiles>
  void prefetch_tiles(const Tile* tiles, const Panel& panel) const {
    for (int t = 0; t < kTiles; ++t) {
      const int64_t first = (tiles[t].out * shape.k + panel.k0) * sizeof(float);
      for (int m = 0; m < M; ++m) {
        const int64_t at = first + m * shape.k * int64_t{sizeof(float)};
        __builtin_prefetch(args.out + at, 1, 3);
        __builtin_prefetch(args.out + at + kLine, 1, 3);
        if (args.residual == nullptr || args.residual == args.out) continue;
        __builtin_prefetch(args.residual + at, 0, 3);
        __builtin_prefetch(args.residual + at + kLine, 0, 3);
      }
    }
  }

  template <int M, int kTiles>
  void store(__m512 (&acc)[kTiles][M][2], const Tile* tiles, const Panel& panel) const {
    const Clamp clamp(args.act);  // hardswish and silu run over the finished rows once more
    const float* residual = reinterpret_cast<const float*>(args.residual);
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const __mmask16 lanes = panel.lanes[v];
      const int64_t k = panel.k0 + 16 * v;
      if (lanes == 0) break;
      const __m512 scale = _mm512_maskz_loadu_ps(lanes, args.scale + k);
      const __m512 shift = _mm512_maskz_loadu_ps(lanes, args.shift + k);
#pragma GCC unroll 2
      for (int t = 0; t < kTiles; ++t) {
        int64_t at = tiles[t].out * shape.k + k;
        const uint32_t rows = tiles[t].rows;
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
          if (!(rows >> m & 1)) continue;
          float* out = reinterpret_cast<float*>(args.out) + at;
          __m512 y = _mm512_fmadd_ps(acc[t][m][v], scale, shift);
          if (residual) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(lanes, residual + at));
          _mm512_mask_storeu_ps(out, lanes, clamp(y));
          at += shape.k;
        }
      }
    }
    if (args.act > kRelu6)
      for (int t = 0; t < kTiles; ++t)
        activate_rows(tiles[t], panel);
  }

  __attribute__((noinline)) void activate_rows(const Tile& tile, const Panel& panel) const {
    float* out = reinterpret_cast<float*>(args.out) + tile.out * shape.k + panel.k0;
    for (int count = __builtin_popcount(tile.rows); count > 0; --count, out += shape.k)
      for (int v = 0; v < 2 && panel.lanes[v]; ++v) {
        const __m512 y = activate(_mm512_maskz_loadu_ps(panel.lanes[v], out + 16 * v), args.act);
        _mm512_mask_storeu_ps(out + 16 * v, panel.lanes[v], y);
      }
  }

  static constexpr Fn kTable1[] = {nullptr,       compute<1, 1>, compute<2, 1>, compute<3, 1>,
                                   compute<4, 1>, compute<5, 1>, compute<6, 1>, compute<7, 1>};
  static constexpr Fn kTable2[] = {nullptr,       compute<1, 2>, compute<2, 2>, compute<3, 2>,
                                   compute<4, 2>, compute<5, 2>, compute<6, 2>, compute<7, 2>};
};

}  // namespace fused_resnet::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC diagnostic pop
#pragma GCC pop_options
#endif
#endif  // __x86_64__
