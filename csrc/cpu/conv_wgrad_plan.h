// What conv_wgrad.cpp hands to its kernels. Offsets and strides are in floats.
#pragma once

#include <cstdint>
#include <vector>

namespace fused_resnet::cpu {

// A row of the packed input holds `columns` pixels, every source_w-th of the image with its padding; neighbouring
// outputs lie step_w of them apart. The same down the image.
struct WgradShape {
  std::int64_t n, c, h, w, k, r, s, p, q;
  std::int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  bool flat;  // 1x1 without stride or padding: all images are one column of pixels, h = p and w = q = 1
  bool fold;  // the R * S * C inputs under the filter are copied side by side: a 1x1 convolution with as many channels
  std::int64_t channels, taps;  // C and R * S, or R * S * C and 1
  std::int64_t source_h, source_w, step_h, step_w;
  std::int64_t span_h, columns;  // rows under an output, and pixels in a packed row
};

struct WgradArgs {
  const float* dy;
  const float* x;
  const float *mean, *scale, *shift;  // readable to the end of the last panel; mean is null without a norm
  int act;
  float* dweight;
  std::int64_t stride[4];
};

struct WgradPlan {
  std::vector<std::int64_t> blocks;  // first output channel of each block of a tile's height, and K at the end
  std::vector<std::int64_t> chunks;  // first block of each chunk whose dy is packed at once, and their number
  std::int64_t panels;               // of input channels
  std::int64_t band_rows, slab_rows;
  std::int64_t dy_floats, x_floats, lone_floats;  // of a thread's scratch
};

// The part of a thread. Its sums lie at sums + panel * panel_stride + k * taps * panel width.
struct WgradTask {
  std::int64_t chunk_begin, chunk_end, panel_begin, panel_end, row_begin, row_end;
  float *dy, *x;      // scratch
  float* sums;        // a panel of one chunk at a time where `lone`
  bool lone, finish;  // all rows are one band; the sums are whole and go to dweight
  std::int64_t panel_stride;
};

}  // namespace fused_resnet::cpu
