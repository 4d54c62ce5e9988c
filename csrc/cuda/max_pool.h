// Max pooling's windows, and the gradient that comes through them to a pixel.
#pragma once

#include <vector>

#include "cuda/launch.h"
#include "cuda/rows.h"

namespace fused_resnet::cuda {

// The argmax of an output is its window's tap r * S + s, in a byte.
constexpr std::int64_t kMostTaps = 25;

// [N, h, w, C] to [N, p, q, C] by windows of r x s.
struct Pool {
  int h, w, p, q, r, s, stride_h, stride_w, pad_h, pad_w;

  // geometry: kernel, stride and padding, each (height, width). x and out may be their gradients.
  Pool(const Arguments& args, const Tensor& x, const char* x_name, const Tensor& out, const char* out_name,
       const std::vector<std::int64_t>& geometry) {
    args.image(x, x_name);
    args.image(out, out_name);
    args.image(out, x, {x.size(0), x.size(1), out.size(2), out.size(3)}, out_name);
    args.length(geometry, 6, "geometry");
    for (int i = 0; i < 2; ++i) {
      args.number(geometry[i], 1, "geometry's window", kMostTaps);
      args.number(geometry[2 + i], 1, "geometry's stride");
      args.number(geometry[4 + i], 0, "geometry's padding", geometry[i] / 2);
      const std::int64_t padded = x.size(2 + i) + 2 * geometry[4 + i];
      args.number(padded, geometry[i], "the padded height or width under the windows");
      args.number(out.size(2 + i), 1, "the number of windows", (padded - geometry[i]) / geometry[2 + i] + 1);
    }
    args.number(geometry[0] * geometry[1], 1, "geometry's window", kMostTaps);
    args.number(x.size(2) * x.size(3), 1, "the size of an image");
    args.number(out.size(2) * out.size(3), 1, "the size of a pooled image");
    int* const sizes[] = {&r, &s, &stride_h, &stride_w, &pad_h, &pad_w};
    for (int i = 0; i < 6; ++i)
      *sizes[i] = static_cast<int>(geometry[i]);
    h = static_cast<int>(x.size(2)), w = static_cast<int>(x.size(3));
    p = static_cast<int>(out.size(2)), q = static_cast<int>(out.size(3));
  }

  // The most windows that a pixel is in, in either direction.
  int cover() const { return static_cast<int>(std::max(ceil_div(r, stride_h), ceil_div(s, stride_w))); }
};

struct Pixel {
  std::int64_t image;
  int row, column;
};

// Which pixels of images [height, width] the rows of a tile are: one division in 64 bits a tile, the others in 32.
class Pixels {
 public:
  FUSED_RESNET_DEVICE Pixels(const RowTile& tile, int height, int width)
      : tile_row_(tile.row), of_image_(static_cast<unsigned>(height) * width), width_(width) {
    image_ = tile.row / of_image_;
    offset_ = static_cast<unsigned>(tile.row - image_ * of_image_);
  }

  FUSED_RESNET_DEVICE Pixel operator()(std::int64_t row) const {
    const unsigned at = offset_ + static_cast<unsigned>(row - tile_row_), image = at / of_image_;
    const unsigned pixel = at - image * of_image_;
    return {image_ + image, static_cast<int>(pixel / width_), static_cast<int>(pixel % width_)};
  }

 private:
  std::int64_t tile_row_, image_;
  unsigned offset_, of_image_, width_;
};

// The gradient of a max pooling's input: each pixel looks at the windows that it is in, and adds up, in fp32 and from
// the last window to the first, the gradients of those that took it. With kCover it is in at most so many in either
// direction, whose loads are all in flight at once; with 0 in any number.
template <class T, int kN, int kCover>
struct PooledGradient {
  static constexpr int kAtOnce = 1, kMostCover = kCover;
  const T* dy;
  const std::uint8_t* argmax;
  Pool pool;

  struct Loaded {
    float sum[kN];
    FUSED_RESNET_DEVICE float operator()(int e) const { return sum[e]; }
  };

  // What window (p, q) gave to its tap (r, s).
  struct Window {
    Pack<T, kN> dy;
    Pack<std::uint8_t, kN> argmax;
    int tap;  // -1: there is no such window

    FUSED_RESNET_DEVICE void load(const PooledGradient& in, const RowTile& tile, const RowGrid& grid,
                                  std::int64_t image, int p, int q, int r, int s) {
      const Pool& pool = in.pool;
      tap = p >= 0 && p < pool.p && q >= 0 && q < pool.q && r < pool.r && s < pool.s ? r * pool.s + s : -1;
      if (tap < 0) return;
      const std::int64_t at = ((image * pool.p + p) * pool.q + q) * grid.channels + tile.channel;
      dy = load_pack<T, kN>(in.dy + at);
      argmax = load_pack<std::uint8_t, kN>(in.argmax + at);
    }

    FUSED_RESNET_DEVICE void add_to(float (&sum)[kN]) const {
      if (tap < 0) return;
#pragma unroll
      for (int e = 0; e < kN; ++e)
        sum[e] += argmax.data[e] == tap ? widen(dy, e) : 0.0f;
    }
  };

  FUSED_RESNET_DEVICE Loaded load(const RowTile& tile, const RowGrid& grid, std::int64_t row) const {
    const Pixel at = Pixels(tile, pool.h, pool.w)(row);
    const int h = at.row + pool.pad_h, w = at.column + pool.pad_w, p = h / pool.stride_h, q = w / pool.stride_w;
    const int r = h - p * pool.stride_h, s = w - q * pool.stride_w;  // of the last window, p and q
    Loaded out{};
    if constexpr (kCover > 0) {
      Window windows[kCover * kCover];
#pragma unroll
      for (int i = 0; i < kCover * kCover; ++i)
        windows[i].load(*this, tile, grid, at.image, p - i / kCover, q - i % kCover, r + i / kCover * pool.stride_h,
                        s + i % kCover * pool.stride_w);
#pragma unroll
      for (int i = 0; i < kCover * kCover; ++i)
        windows[i].add_to(out.sum);
    } else {
      for (int i = 0; r + i * pool.stride_h < pool.r; ++i)
        for (int j = 0; s + j * pool.stride_w < pool.s; ++j) {
          Window window;
          window.load(*this, tile, grid, at.image, p - i, q - j, r + i * pool.stride_h, s + j * pool.stride_w);
          window.add_to(out.sum);
        }
    }
    return out;
  }
};

}  // namespace fused_resnet::cuda
