// Bands: how the convolution kernels see their input. A band is a range of output rows with the inputs under it, copied
// to scratch so that one pixel stride serves every tap: zeros stand where the padding is, and a strided convolution is
// split into phases (even and odd rows and columns for stride 2), which makes neighbouring outputs neighbours again.
// A 1x1 convolution without stride or padding reads its input in place.
#pragma once

#include "cpu/conv_avx512.h"
#include "cpu/memory.h"

#if defined(__x86_64__)
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")
#endif

namespace fused_resnet::cpu {

struct Layout {
  struct Plane {
    int64_t row_phase, col_phase;
  };
  bool direct;
  int64_t cols;          // columns of a plane's row
  int64_t pitch;         // columns between its rows; less than cols where the zeros of neighbouring rows are shared
  int64_t extra_rows;    // rows of a plane beyond one for each output row
  int64_t pixel_bytes;   // copied, with the zeros that fill up the channels
  int64_t pixel_stride;  // bytes
  std::vector<Plane> planes;

  explicit Layout(const ConvShape& g) {
    const int64_t c_bytes = g.c * g.element;
    // Pixels 4 KB apart share one set of the L1 cache, which holds fewer lines than a tile has pixels.
    direct = g.r * g.s * g.stride_h * g.stride_w == 1 && g.pad_h + g.pad_w == 0 && g.channels == g.c &&
             c_bytes % 4096 != 0 && g.n * g.h * g.w >= 16;
    if (direct) {
      cols = pitch = g.q;
      extra_rows = 0;
      pixel_bytes = pixel_stride = c_bytes;
      return;
    }
    pixel_bytes = g.fold || g.element == 2 ? ceil_div(g.channels * g.element, kLine) * kLine : c_bytes;
    pixel_stride = pixel_bytes >= 1024 && pixel_bytes / kLine % 2 == 0 ? pixel_bytes + kLine : pixel_bytes;
    extra_rows = (g.r - 1) * g.dilation_h / g.stride_h;
    cols = g.fold ? g.q : g.q + (g.s - 1) * g.dilation_w / g.stride_w;
    int64_t shared = g.fold ? 0 : cols;
    for (int64_t a = 0; a < g.stride_h; ++a) {
      if (!hit(a, g.r, g.dilation_h, g.stride_h)) continue;
      for (int64_t b = 0; b < (g.fold ? 1 : g.stride_w); ++b) {
        if (!g.fold && !hit(b, g.s, g.dilation_w, g.stride_w)) continue;
        planes.push_back({a, b});
        if (!g.fold) shared = std::min({shared, first_col(g, b), cols - last_col(g, b)});
      }
    }
    pitch = std::max(g.q, cols - shared);
  }

  // Columns of the plane that hold input, [first_col, last_col); the others are padding.
  int64_t first_col(const ConvShape& g, int64_t phase) const {
    return std::min(cols, std::max<int64_t>(0, ceil_div(g.pad_w - phase, g.stride_w)));
  }
  int64_t last_col(const ConvShape& g, int64_t phase) const {
    const int64_t end = g.w + g.pad_w - phase;
    return std::max(first_col(g, phase), std::min(cols, end <= 0 ? 0 : ceil_div(end, g.stride_w)));
  }
  int64_t row_bytes() const { return static_cast<int64_t>(planes.size()) * pitch * pixel_stride; }

 private:
  static bool hit(int64_t phase, int64_t taps, int64_t dilation, int64_t stride) {
    for (int64_t i = 0; i < taps; ++i)
      if (i * dilation % stride == phase) return true;
    return false;
  }
};

// Scratch of a thread, kept from call to call.
class Scratch {
 public:
  char* reserve(int64_t bytes) {
    if (bytes > capacity_) {
      capacity_ = ceil_div(bytes, kGrain) * kGrain;
      data_.reset(static_cast<char*>(std::aligned_alloc(kGrain, capacity_)));
      if (!data_) capacity_ = 0, throw std::bad_alloc();
      advise_huge_pages(data_.get(), capacity_);
    }
    return data_.get();
  }
  std::vector<int64_t> tap_offset;
  std::vector<Tile> tiles;

 private:
  static constexpr int64_t kGrain = 2 << 20;
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> data_;
  int64_t capacity_ = 0;
};

// Fills planes and tiles for the output rows [begin, end), counted over all images.
template <int64_t kMaxTile>
class BandBuilder {
 public:
  BandBuilder(const ConvShape& shape, const Layout& layout, Scratch& scratch)
      : g_(shape), l_(layout), scratch_(scratch) {}

  Band rows(const char* x, int64_t begin, int64_t end) {
    const int64_t images = (end - 1) / g_.p - begin / g_.p + 1;
    const int64_t plane_rows = end - begin + images * l_.extra_rows;
    const int64_t plane_bytes = plane_rows * l_.pitch * l_.pixel_stride;
    const int64_t slack =
        (l_.cols + 2 * kMaxTile) * l_.pixel_stride;  // the last row's zeros, the last tile's idle rows
    const int64_t planes = l_.planes.size(), line_bytes = g_.fold ? line_columns() * g_.c * g_.element + kLine : 0;
    char* base = scratch_.reserve(planes * plane_bytes + slack + line_bytes);
    char* line = base + planes * plane_bytes + slack;

    for (int64_t i = 0; i < planes; ++i) {
      int64_t row = 0;
      each_part(begin, end, [&](int64_t n, int64_t p0, int64_t p1) {
        const char* image = x + n * g_.h * g_.w * g_.c * g_.element;
        for (int64_t y = p0; y < p1 + l_.extra_rows; ++y, ++row) {
          char* dst = base + i * plane_bytes + row * l_.pitch * l_.pixel_stride;
          const int64_t in_y = y * g_.stride_h + l_.planes[i].row_phase - g_.pad_h;
          if (in_y < 0 || in_y >= g_.h)
            std::memset(dst, 0, l_.cols * l_.pixel_stride);
          else if (g_.fold)
            fold_row(dst, image + in_y * g_.w * g_.c * g_.element, line);
          else
            copy_row(dst, image + in_y * g_.w * g_.c * g_.element, l_.planes[i].col_phase);
        }
      });
    }

    scratch_.tap_offset.clear();
    for (int64_t r = 0; r < g_.r; ++r)
      for (int64_t s = 0; s < (g_.fold ? 1 : g_.s); ++s) {
        const int64_t y = r * g_.dilation_h, x = s * g_.dilation_w;
        int64_t plane = 0;
        while (l_.planes[plane].row_phase != y % g_.stride_h || l_.planes[plane].col_phase != x % g_.stride_w)
          ++plane;
        const int64_t pixel = y / g_.stride_h * l_.pitch + x / g_.stride_w;
        scratch_.tap_offset.push_back(plane * plane_bytes + pixel * l_.pixel_stride);
      }

    scratch_.tiles.clear();
    const int64_t size = kMaxTile == 16 ? 16 : ceil_div(g_.q, ceil_div(g_.q, kMaxTile));
    int64_t row = 0;
    each_part(begin, end, [&](int64_t n, int64_t p0, int64_t p1) {
      const int64_t out = (n * g_.p + p0) * g_.q;
      if (kMaxTile == 16)
        flat_tiles(row * l_.pitch, out, p1 - p0);
      else
        for (int64_t p = 0; p < p1 - p0; ++p)
          row_tiles((row + p) * l_.pitch, out + p * g_.q, g_.q, size);
      row += p1 - p0 + l_.extra_rows;
    });
    return band(base, size);
  }

  // The same for the pixels [begin, end) of a convolution that reads its input in place.
  Band pixels(const char* x, int64_t begin, int64_t end) {
    scratch_.tap_offset.assign(1, 0);
    scratch_.tiles.clear();
    const int64_t total = g_.n * g_.h * g_.w;
    const int64_t size = std::min(kMaxTile, kMaxTile == 16 ? 16 : end - begin);
    if (kMaxTile == 16)
      for (int64_t i = begin; i < end; i += 16) {
        const int64_t first = std::min(i, total - 16);  // never past the input; the rows of another tile stay idle
        const uint32_t rows = (1u << (std::min(end, i + 16) - first)) - (1u << (i - first));
        scratch_.tiles.push_back({first * l_.pixel_stride, i, rows});
      }
    else
      row_tiles(begin, begin, end - begin, size);
    return band(x, size);
  }

 private:
  Band band(const char* base, int64_t tile_rows) const {
    return {base,
            l_.pixel_stride,
            scratch_.tap_offset.data(),
            scratch_.tiles.data(),
            static_cast<int64_t>(scratch_.tiles.size()),
            tile_rows};
  }

  template <class F>
  void each_part(int64_t begin, int64_t end, const F& f) const {
    for (int64_t row = begin; row < end;) {
      const int64_t n = row / g_.p, p0 = row % g_.p, p1 = std::min(g_.p, p0 + end - row);
      f(n, p0, p1);
      row += p1 - p0;
    }
  }

  // A row of pixels in tiles of one size; the last one moves back and leaves alone what its neighbour has written.
  void row_tiles(int64_t in, int64_t out, int64_t count, int64_t size) {
    for (int64_t i = 0; i < count; i += size) {
      const int64_t first = std::min(i, count - size);
      const uint32_t rows = (1u << size) - (1u << (i - first));
      scratch_.tiles.push_back({(in + first) * l_.pixel_stride, out + i, rows});
    }
  }

  // Rows of pixels and the padding between them as one long row: an AMX tile may start and end in any row.
  void flat_tiles(int64_t in, int64_t out, int64_t rows) {
    const int64_t end = (rows - 1) * l_.pitch + g_.q;
    for (int64_t i = 0; i < end;) {
      uint32_t mask = 0;
      const int64_t p = i / l_.pitch, q = i % l_.pitch;
      for (int64_t m = 0, column = q; m < 16 && i + m < end; ++m, ++column) {
        if (column == l_.pitch) column = 0;
        if (column < g_.q) mask |= 1u << m;
      }
      scratch_.tiles.push_back({(in + i) * l_.pixel_stride, out + p * g_.q + q, mask});
      i += 16;
      if (i % l_.pitch >= g_.q) i += l_.pitch - i % l_.pitch;
    }
  }

  void copy_row(char* dst, const char* row, int64_t phase) const {
    const int64_t c_bytes = g_.c * g_.element, step = g_.stride_w * c_bytes;
    const int64_t first = l_.first_col(g_, phase), last = l_.last_col(g_, phase);
    std::memset(dst, 0, first * l_.pixel_stride);
    const char* src = row + (first * g_.stride_w + phase - g_.pad_w) * c_bytes;
    if (g_.stride_w == 1 && c_bytes == l_.pixel_stride)
      copy_padded(dst + first * step, src, (last - first) * step, (last - first) * step);
    else
      for (int64_t j = first; j < last; ++j, src += step)
        copy_padded(dst + j * l_.pixel_stride, src, c_bytes, l_.pixel_bytes);
    std::memset(dst + last * l_.pixel_stride, 0, (l_.cols - last) * l_.pixel_stride);
  }

  int64_t line_columns() const {
    return std::max(g_.pad_w + g_.w, (g_.q - 1) * g_.stride_w + (g_.s - 1) * g_.dilation_w + 1);
  }

  // Pixel q of the folded row holds the S * C inputs under the filter row.
  void fold_row(char* dst, const char* row, char* line) const {
    const int64_t c_bytes = g_.c * g_.element, left = g_.pad_w * c_bytes, width = g_.w * c_bytes;
    std::memset(line, 0, left);
    std::memcpy(line + left, row, width);
    std::memset(line + left + width, 0, line_columns() * c_bytes - left - width);
    for (int64_t q = 0; q < g_.q; ++q, dst += l_.pixel_stride) {
      const char* src = line + q * g_.stride_w * c_bytes;
      if (g_.dilation_w == 1) {
        copy_padded(dst, src, g_.s * c_bytes, l_.pixel_bytes);
        continue;
      }
      std::memset(dst, 0, l_.pixel_bytes);
      for (int64_t s = 0; s < g_.s; ++s)
        std::memcpy(dst + s * c_bytes, src + s * g_.dilation_w * c_bytes, c_bytes);
    }
  }

  const ConvShape& g_;
  const Layout& l_;
  Scratch& scratch_;
};

}  // namespace fused_resnet::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
