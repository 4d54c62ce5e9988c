// Convolution in bf16 with AMX.
#pragma once

#include "cpu/conv_avx512.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma"))), apply_to = function)
#else
#pragma GCC push_options
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

  struct Panel {
    const char* weight;
    const char* next;    // weights that the following panel needs, fetched to L2 while this one computes
    int64_t next_lines;  // cache lines of them for each 32 channels
    __mmask32 lanes;     // channels that exist
    int64_t k0;
  };

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
    const int64_t passes = (band.num_tiles + 1) / 2;
    const int64_t lines = std::max<int64_t>(1, 2 * kTileBytes / kLine / passes);
    const int64_t share = lines * shape.taps * shape.channels / kPanel * kLine;  // bytes that each pass fetches
    for (int64_t j = panel_begin; j < panel_end; ++j) {
      const int64_t left = shape.k - j * kPanel;
      Panel panel{args.weight + j * shape.panel_bytes(), nullptr, 0, 0, j * kPanel};
      panel.lanes = left >= 32 ? ~0u : (1u << left) - 1;
      for (int64_t i = 0; i < band.num_tiles; i += 2) {
        const bool fetch = j + 1 < panel_end && (i / 2 + 1) * share <= shape.panel_bytes();
        panel.next = panel.weight + shape.panel_bytes() + i / 2 * share;
        panel.next_lines = fetch ? lines : 0;
        if (i + 1 < band.num_tiles)
          compute<2>(band, band.tiles + i, panel);
        else
          compute<1>(band, band.tiles + i, panel);
      }
    }
  }

 private:
  template <int kTiles>
  void compute(const Band& band, const Tile* tiles, const Panel& panel) const {
    alignas(64) float sums[kTiles * 16][kPanel];
    const int64_t stride = band.pixel_stride;
    const char* w = panel.weight;
    const char* next = panel.next;
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kTiles == 2) {
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t tap = 0; tap < shape.taps; ++tap) {
      const char* a = band.base + tiles[0].in + band.tap_offset[tap];
      const char* b = band.base + tiles[kTiles - 1].in + band.tap_offset[tap];
      for (int64_t c = 0; c < shape.channels; c += kPanel) {
        _tile_loadd(4, a, stride);
        _tile_loadd(6, w, kLine);
        _tile_loadd(7, w + kTileBytes, kLine);
        if constexpr (kTiles == 2) _tile_loadd(5, b, stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (kTiles == 2) {
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
        for (int64_t i = 0; i < panel.next_lines; ++i, next += kLine) __builtin_prefetch(next, 0, 2);
        w += 2 * kTileBytes;
        a += kLine;
        b += kLine;
      }
    }
    constexpr int64_t kRow = kPanel * sizeof(float);
    _tile_stored(0, sums[0], kRow);
    _tile_stored(1, sums[0] + 16, kRow);
    if constexpr (kTiles == 2) {
      _tile_stored(2, sums[16], kRow);
      _tile_stored(3, sums[16] + 16, kRow);
    }
    for (int t = 0; t < kTiles; ++t) store(sums + 16 * t, tiles[t], panel);
  }

  void store(const float (*sums)[kPanel], const Tile& tile, const Panel& panel) const {
    const __mmask16 low = static_cast<__mmask16>(panel.lanes), high = static_cast<__mmask16>(panel.lanes >> 16);
    const __m512 scale0 = _mm512_maskz_loadu_ps(low, args.scale + panel.k0);
    const __m512 scale1 = _mm512_maskz_loadu_ps(high, args.scale + panel.k0 + 16);
    const __m512 shift0 = _mm512_maskz_loadu_ps(low, args.shift + panel.k0);
    const __m512 shift1 = _mm512_maskz_loadu_ps(high, args.shift + panel.k0 + 16);
    int64_t at = (tile.out * shape.k + panel.k0) * 2;
    for (int m = 0; m < kMaxTile; ++m) {
      if (!(tile.rows >> m & 1)) continue;
      __m512 y0 = _mm512_fmadd_ps(_mm512_load_ps(sums[m]), scale0, shift0);
      __m512 y1 = _mm512_fmadd_ps(_mm512_load_ps(sums[m] + 16), scale1, shift1);
      if (args.residual) {
        const __m512i r = _mm512_maskz_loadu_epi16(panel.lanes, args.residual + at);
        y0 = _mm512_add_ps(y0, widen(_mm512_castsi512_si256(r)));
        y1 = _mm512_add_ps(y1, widen(_mm512_extracti64x4_epi64(r, 1)));
      }
      y0 = activate(y0, args.act);
      y1 = activate(y1, args.act);
      const __m512bh y = _mm512_cvtne2ps_pbh(y1, y0);
      __m512i bits;
      std::memcpy(&bits, &y, sizeof(bits));
      _mm512_mask_storeu_epi16(args.out + at, panel.lanes, bits);
      at += shape.k * 2;
    }
  }

  static __m512 widen(__m256i bf16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16));
  }
};

}  // namespace fused_resnet::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
