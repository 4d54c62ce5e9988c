// Convolution in bf16 with AMX.
#pragma once

#include "cpu/conv_avx512.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(                                                                       \
    __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in the compiler's own intrinsics, gcc 12
#pragma GCC target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")
#endif

namespace fused_resnet::cpu {

// out[m, k] = act(sum_{t, c} x[m, t, c] w[t, c, k] * scale[k] + shift[k] + residual[m, k])
// for two tiles of 16 pixels and the 32 channels of one panel: four 16 x 16 accumulators in fp32 (tiles 0 to 3), inputs
// in tiles 4 and 5 straight from channels_last memory, weights in tiles 6 and 7.
struct AmxKernel {
  static constexpr int64_t kMaxTile = 16;
  static constexpr int64_t kTileBytes = 16 * kLine;

  const ConvShape& shape;
  const ConvArgs& args;

  struct TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };

  static void begin_thread() {
    alignas(64) static constexpr TileConfig kConfig;
    _tile_loadconfig(&kConfig);
  }
  static void end_thread() { _tile_release(); }

  void run(const Band& band, int64_t panel_begin, int64_t panel_end) const {
    const int64_t passes = (band.num_tiles + 1) / 2, panels = panel_end - panel_begin;
    const bool few = few_at_once(shape, band, panels);
    const int64_t group = few ? 1 : passes, steps = shape.taps * shape.channels / kPanel;
    const int64_t lines = std::max<int64_t>(1, 2 * kTileBytes / kLine / group);
    const int64_t share = lines * steps * kLine;  // bytes of the next panel that each pass fetches
    alignas(64) float sums[2][2 * kMaxTile][kPanel];
    Pending pending{};
    Ahead ahead;
    int64_t pass = 0;
    for (int64_t first = 0; first < passes; first += group) {
      if (few) ahead = next_tiles(band, first + 1, panels * steps);
      for (int64_t j = panel_begin; j < panel_end; ++j) {
        const int64_t left = shape.k - j * kPanel;
        const __mmask32 lanes = left >= 32 ? ~0u : (1u << left) - 1;
        const char* weight = args.weight + j * shape.panel_bytes();
        for (int64_t i = first; i < first + group; ++i, ++pass) {
          const Tile* tiles = band.tiles + 2 * i;
          const bool pair = 2 * i + 1 < band.num_tiles;
          if (!few) {
            const bool fetch = j + 1 < panel_end && (i + 1) * share <= shape.panel_bytes();
            ahead.input = {weight + shape.panel_bytes() + i * share, fetch ? lines : 0};
          }
          const Pending current = begin(tiles, pair ? 2 : 1, j * kPanel, lanes, sums[pass % 2], !few);
          pair ? multiply<2>(band, tiles, weight, ahead, sums[pass % 2], pending)
               : multiply<1>(band, tiles, weight, ahead, sums[pass % 2], pending);
          store(pending, 2 * kMaxTile);
          pending = current;
        }
      }
    }
    store(pending, 2 * kMaxTile);
  }

 private:
  struct Ahead {
    Stream input, residual, out;  // the input, or the weights of the following panel
  };

  // What the tiles of another pass read and write, for `steps` steps to fetch.
  Ahead next_tiles(const Band& band, int64_t pass, int64_t steps) const {
    Ahead ahead;
    if (2 * pass + 1 >= band.num_tiles) return ahead;
    const Tile* tiles = band.tiles + 2 * pass;
    const int64_t in_lines = 2 * kMaxTile * band.pixel_stride / kLine, out_bytes = shape.k * 2;
    ahead.input = {band.base + tiles[0].in, ceil_div(in_lines, steps)};
    const int64_t out_lines = (tiles[1].out - tiles[0].out + kMaxTile) * out_bytes / kLine;
    ahead.out = {args.out + tiles[0].out * out_bytes, ceil_div(out_lines, steps)};
    if (args.residual && args.residual != args.out)
      ahead.residual = {args.residual + tiles[0].out * out_bytes, ahead.out.lines};
    return ahead;
  }

  // Sums that wait to be scaled and written: that happens between the steps of the next pass, while its tiles multiply.
  struct Pending {
    const float (*sums)[kPanel];
    uint32_t rows;    // that are left: bits 0 to 15 of the first tile, 16 to 31 of the second
    __mmask32 lanes;  // channels that exist
    int64_t k0;
    int64_t at[2];  // bytes from the output to the next row of each tile
  };

  // With `fetch`, the residual and the output are fetched now and used a pass later.
  Pending begin(const Tile* tiles, int count, int64_t k0, __mmask32 lanes, const float (*sums)[kPanel],
                bool fetch) const {
    Pending p{sums, 0, lanes, k0, {}};
    const bool apart = args.residual && args.residual != args.out;
    for (int t = 0; t < count; ++t) {
      p.rows |= tiles[t].rows << (16 * t);
      p.at[t] = (tiles[t].out * shape.k + k0) * 2;
      int64_t at = p.at[t];
      for (int m = fetch ? __builtin_popcount(tiles[t].rows) : 0; m > 0; --m, at += shape.k * 2) {
        __builtin_prefetch(args.out + at, 1, 3);
        if (apart) __builtin_prefetch(args.residual + at, 0, 3);
      }
    }
    return p;
  }

  template <int kTiles>
  void multiply(const Band& band, const Tile* tiles, const char* w, Ahead& ahead, float (*sums)[kPanel],
                Pending& pending) const {
    const int64_t stride = band.pixel_stride;
    const int64_t rows_per_step = ceil_div(2 * kMaxTile * kPanel, shape.taps * shape.channels);
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kTiles == 2) {
      _tile_zero(2);
      _tile_zero(3);
    }
    // Taps inside channels: neighbouring taps read the same pixels, which L1 then still holds.
    const char* a = band.base + tiles[0].in;
    const char* b = band.base + tiles[kTiles - 1].in;
    for (int64_t c = 0; c < shape.channels; c += kPanel, a += kLine, b += kLine)
      for (int64_t tap = 0; tap < shape.taps; ++tap) {
        const int64_t offset = band.tap_offset[tap];
        _tile_loadd(4, a + offset, stride);
        _tile_loadd(6, w, kLine);
        _tile_loadd(7, w + kTileBytes, kLine);
        if constexpr (kTiles == 2) _tile_loadd(5, b + offset, stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (kTiles == 2) {
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
        for (int64_t i = 0; i < ahead.input.lines; ++i, ahead.input.data += kLine)
          __builtin_prefetch(ahead.input.data, 0, 2);
        for (int64_t i = 0; i < ahead.out.lines; ++i, ahead.out.data += kLine)
          __builtin_prefetch(ahead.out.data, 1, 2);
        for (int64_t i = 0; i < ahead.residual.lines; ++i, ahead.residual.data += kLine)
          __builtin_prefetch(ahead.residual.data, 0, 2);
        store(pending, rows_per_step);
        w += 2 * kTileBytes;
      }
    constexpr int64_t kRow = kPanel * sizeof(float);
    _tile_stored(0, sums[0], kRow);
    _tile_stored(1, sums[0] + 16, kRow);
    if constexpr (kTiles == 2) {
      _tile_stored(2, sums[16], kRow);
      _tile_stored(3, sums[16] + 16, kRow);
    }
  }

  void store(Pending& p, int64_t count) const {
    if (p.rows == 0) return;
    const __mmask16 lanes0 = static_cast<__mmask16>(p.lanes), lanes1 = static_cast<__mmask16>(p.lanes >> 16);
    const __m512 scale0 = _mm512_maskz_loadu_ps(lanes0, args.scale + p.k0);
    const __m512 scale1 = _mm512_maskz_loadu_ps(lanes1, args.scale + p.k0 + 16);
    const __m512 shift0 = _mm512_maskz_loadu_ps(lanes0, args.shift + p.k0);
    const __m512 shift1 = _mm512_maskz_loadu_ps(lanes1, args.shift + p.k0 + 16);
    const Clamp clamp(args.act);
    for (; count > 0 && p.rows != 0; --count, p.rows &= p.rows - 1) {
      const int m = __builtin_ctz(p.rows);
      int64_t& at = p.at[m / 16];
      __m512 y0 = _mm512_fmadd_ps(_mm512_load_ps(p.sums[m]), scale0, shift0);
      __m512 y1 = _mm512_fmadd_ps(_mm512_load_ps(p.sums[m] + 16), scale1, shift1);
      if (args.residual) {
        const __m512i r = _mm512_maskz_loadu_epi16(p.lanes, args.residual + at);
        y0 = _mm512_add_ps(y0, widen(_mm512_castsi512_si256(r)));
        y1 = _mm512_add_ps(y1, widen(_mm512_extracti64x4_epi64(r, 1)));
      }
      if (args.act > kRelu6) {
        y0 = activate(y0, args.act);
        y1 = activate(y1, args.act);
      }
      const __m512bh y = _mm512_cvtne2ps_pbh(clamp(y1), clamp(y0));
      __m512i bits;
      std::memcpy(&bits, &y, sizeof(bits));
      _mm512_mask_storeu_epi16(args.out + at, p.lanes, bits);
      at += shape.k * 2;
    }
  }

  static __m512 widen(__m256i bf16) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16)); }
};

}  // namespace fused_resnet::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC diagnostic pop
#pragma GCC pop_options
#endif
#endif  // __x86_64__
