// What the convolution kernels share: the problem, the packed weights, and the tiles that a thread works through.
#pragma once

#include <cstdint>

#include "act.h"

namespace fused_resnet::cpu {

constexpr int64_t kPanel = 32;      // output channels that a panel of packed weights holds
constexpr int64_t kLine = 64;       // bytes of a cache line, and of a row of an AMX tile
constexpr int64_t kFoldLimit = 64;  // S * C up to which a filter row is treated as one tap (a stem with 3 channels)

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

struct ConvShape {
  int64_t n, c, h, w, k, r, s, p, q;
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t element;   // bytes: 4 (fp32) or 2 (bf16)
  bool fold;         // the S * C inputs under a filter row are copied side by side and make one tap
  int64_t channels;  // depth of a tap as the kernel sees it: C, or S * C folded; bf16 rounds up to 32
  int64_t taps;      // R * S, or R folded

  int64_t panels() const { return ceil_div(k, kPanel); }
  int64_t panel_bytes() const { return taps * channels * kPanel * element; }
};

struct ConvArgs {
  const char* x;
  const char* weight;  // [panels][taps][channels][32]; bf16 pairs channels: [panels][channels / 32][taps][2][16][16][2]
  const float* scale;
  const float* shift;
  const char* residual;  // null when there is none; may be `out`
  char* out;
  int64_t act;
};

// Pixels that the kernel computes at once: they lie at in, in + pixel_stride, ... and, where their bit in `rows` is
// set, are written to consecutive output pixels from `out` on.
struct Tile {
  int64_t in;  // bytes from Band::base
  int64_t out;
  uint32_t rows;
};

// The part of the input that a thread works on for all its output channels, small enough to stay in the L2 cache.
struct Band {
  const char* base;
  int64_t pixel_stride;       // bytes
  const int64_t* tap_offset;  // [taps], bytes
  const Tile* tiles;
  int64_t num_tiles;
  int64_t tile_rows;  // pixels of each tile: at most 7 (fp32), 16 (bf16)
};

// In which order a band's tiles meet the panels of weights.
//  - All tiles with one panel after the other: weights are read from memory once. The next panel is fetched meanwhile.
//  - Tiles two by two with all the panels: their input stays in L1 and whole pixels are written. That needs weights
//  that
//    stay in L2. What the next two tiles read and write is fetched meanwhile: one pass is shorter than a memory access.
inline bool few_at_once(const ConvShape& shape, const Band& band, int64_t panels) {
  const int64_t pair_bytes = 2 * band.tile_rows * shape.channels * shape.element;
  return shape.taps == 1 && band.num_tiles >= 16 && pair_bytes <= (32 << 10) &&
         panels * shape.panel_bytes() <= (1 << 20);
}

// Memory that is fetched while a kernel computes, so many lines at each of its steps.
struct Stream {
  const char* data = nullptr;
  int64_t lines = 0;
};

}  // namespace fused_resnet::cpu
