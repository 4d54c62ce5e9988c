// What the depthwise kernels share: geometry, how a map is cut into strips, and how the input under one is read.
//
// A thread owns kN channels of kColumns neighbouring columns, a strip, and slides down some rows of it, so that a row
// of the input is loaded once a strip and converted once for all outputs that it reaches. Neighbouring threads have
// neighbouring channels, then neighbouring columns: a warp's accesses lie side by side, and the columns that two
// strips share come from L1. No thread waits for another.
#pragma once

#include <limits>
#include <vector>

#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/widen.h"

namespace fused_resnet::cuda {

constexpr int kDepthwiseThreads = 128;  // of a block, at most

// A convolution with one filter a channel: x [N, H, W, C], out [N, P, Q, C], and the window, each (down, across).
struct Depthwise {
  int images, h, w, p, q, channels;
  int window[2], stride[2], padding[2], dilation[2];

  // x and out may be their gradients.
  Depthwise(const Arguments& args, const Tensor& x, const char* x_name, const Tensor& out, const char* out_name,
            const std::vector<std::int64_t>& geometry) {
    args.image(x, x_name);
    const auto map = args.map(x, geometry, 8);
    args.image(out, x, {x.size(0), x.size(1), map[0], map[1]}, out_name);
    args.number(geometry[0] * geometry[1], 1, "geometry's window");
    images = static_cast<int>(x.size(0)), channels = static_cast<int>(x.size(1));
    h = static_cast<int>(x.size(2)), w = static_cast<int>(x.size(3));
    p = static_cast<int>(out.size(2)), q = static_cast<int>(out.size(3));
    for (int i = 0; i < 2; ++i) {
      window[i] = static_cast<int>(geometry[i]);
      stride[i] = static_cast<int>(geometry[2 + i]);
      padding[i] = static_cast<int>(geometry[4 + i]);
      dilation[i] = static_cast<int>(geometry[6 + i]);
    }
  }

  std::int64_t taps() const { return static_cast<std::int64_t>(window[0]) * window[1]; }

  // Whether the window is r x r, without dilation and with the same stride down and across.
  bool is(int r, int step) const {
    return window[0] == r && window[1] == r && stride[0] == step && stride[1] == step && dilation[0] == 1 &&
           dilation[1] == 1;
  }
};

// A map of `height` rows cut into strips of `rows` rows, `columns` columns and `width` channels.
struct Strips {
  int height, rows, columns, width;
  unsigned vectors, groups, down;  // across the channels, the columns and the rows

  Strips(int height, int across, int channels, int rows, int columns, int width)
      : height(height),
        rows(rows),
        columns(columns),
        width(width),
        vectors(static_cast<unsigned>(channels / width)),
        groups(static_cast<unsigned>(ceil_div(across, columns))),
        down(static_cast<unsigned>(ceil_div(height, rows))) {}

  std::int64_t of_an_image() const { return static_cast<std::int64_t>(vectors) * groups * down; }
};

// One of them: its first row, column and channel, and the rows that it has in the map.
struct Strip {
  int image, row, rows, column, c;

  FUSED_RESNET_DEVICE Strip(const Strips& all, unsigned number) {
    c = static_cast<int>(number % all.vectors) * all.width;
    number /= all.vectors;
    column = static_cast<int>(number % all.groups) * all.columns;
    number /= all.groups;
    row = static_cast<int>(number % all.down) * all.rows;
    image = static_cast<int>(number / all.down);
    rows = all.height - row < all.rows ? all.height - row : all.rows;
  }
};

// Reads rows of kWidth columns, kN channels each, downwards from row h and column w of an image [height, width, C];
// zeros outside of [first, last) and of the columns.
template <class T, int kN, int kWidth>
struct Rows {
  const T* next;  // row h, column w, which may be outside of the tensor where it is not read
  std::int64_t pitch;
  int channels, h, first, last;
  unsigned inside = 0;  // a bit a column

  FUSED_RESNET_DEVICE Rows(const T* image, int width, int channels, int c, int h, int w, int first, int last)
      : pitch(static_cast<std::int64_t>(width) * channels), channels(channels), h(h), first(first), last(last) {
    next = image + h * pitch + static_cast<std::int64_t>(w) * channels + c;
#pragma unroll
    for (int j = 0; j < kWidth; ++j)
      inside |= (w + j >= 0 && w + j < width ? 1u : 0u) << j;
  }

  FUSED_RESNET_DEVICE void read(Raw<T, kN> (&to)[kWidth]) {
    const unsigned wanted = h >= first && h < last ? inside : 0;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      to[j] = {};
      if (wanted >> j & 1) to[j].load(next + static_cast<std::int64_t>(j) * channels);
    }
    next += pitch;
    ++h;
  }
};

// Calls body(first image, images, strips) for as many images at a time as keep the number of a strip in 32 bits.
template <class Body>
void for_images(int images, std::int64_t strips_of_an_image, const Body& body) {
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max() - kDepthwiseThreads;
  STD_TORCH_CHECK(strips_of_an_image <= kMost, "depthwise convolution: more than 2^31 strips in an image");
  const auto together = static_cast<int>(std::min<std::int64_t>(images, kMost / strips_of_an_image));
  for (int first = 0; first < images; first += together) {
    const int here = std::min(together, images - first);
    body(first, here, static_cast<unsigned>(here * strips_of_an_image));
  }
}

// Calls body(integral constant) with the first of the widths that is at most `wanted` and divides the channels.
template <int... kWidths, class Body>
void with_channels(int channels, std::int64_t wanted, const Body& body) {
  bool found = false;
  ((found || channels % kWidths || kWidths > wanted
        ? void()
        : (found = true, void(body(std::integral_constant<int, kWidths>{})))),
   ...);
  STD_TORCH_CHECK(found, "depthwise convolution: no kernel has so few channels a thread");
}

// Calls body(window, stride), integral constants, for those that have a kernel of their own; returns whether it has.
template <class Body>
bool with_window(const Depthwise& conv, const Body& body) {
  const auto call = [&](auto window, auto stride) {
    if (!conv.is(window(), stride())) return false;
    body(window, stride);
    return true;
  };
  constexpr std::integral_constant<int, 1> kOne;
  constexpr std::integral_constant<int, 2> kTwo;
  constexpr std::integral_constant<int, 3> kThree;
  constexpr std::integral_constant<int, 5> kFive;
  return call(kThree, kOne) || call(kThree, kTwo) || call(kFive, kOne) || call(kFive, kTwo);
}

}  // namespace fused_resnet::cuda
