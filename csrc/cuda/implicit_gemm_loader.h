// The implicit GEMM's copies to shared memory.
#pragma once

#include "cuda/implicit_gemm_plan.h"

namespace fused_resnet::cuda {

struct ConvArgs {
  const void* x;
  const void* weight;  // [K, depth]
  const float* scale;  // null: 1
  const float* shift;  // null: 0
  const void* residual;
  void* out;
  float* sums;      // [splits, pixels, K]: where the depth is split, sums go there and nothing else is done
  float* partials;  // [tiles of pixels, 3, K]: the moments of what is written to out
  int act;
};

// Copies the steps of a block's depth to shared memory. A thread copies the same chunk of each of its rows. Without
// kAligned, where the channels of a tap are not whole chunks, it gathers the elements of a chunk of a one by one.
template <class T, class Tile, bool kAligned>
class Loader {
 public:
  static constexpr int kElements = kChunkBytes / static_cast<int>(sizeof(T));
  static constexpr int kStep = kRowChunks * kElements;
  static constexpr int kRowsA = Tile::kM / Tile::kCopyRows, kRowsB = Tile::kN / Tile::kCopyRows;

  FUSED_RESNET_DEVICE Loader(const ConvShape& g, const ConvArgs& args, const Work& work, int first_step)
      : g_(g),
        row_(static_cast<int>(threadIdx.x) / kRowChunks),
        chunk_(static_cast<int>(threadIdx.x) % kRowChunks),
        at_(first_step * kStep + chunk_ * kElements),
        depth_(g, at_),
        channels_(g.group_k - work.channel) {
    // The tile's first pixel is divided in 64 bits, the others, from there on, in 32.
    const std::int64_t image = work.pixel / g.map();
    const auto first = static_cast<unsigned>(work.pixel % g.map()), map = static_cast<unsigned>(g.map());
    x_ = static_cast<const T*>(args.x) + image * g.h * g.w * g.c + work.group * g.group_c;
#pragma unroll
    for (int i = 0; i < kRowsA; ++i) {
      const int row = row_ + i * Tile::kCopyRows;
      const unsigned images = first + row < map ? 0 : (first + row) / map, pixel = first + row - images * map;
      const int h = static_cast<int>(pixel / g.q) * g.stride_h - g.pad_h;
      const int w = static_cast<int>(pixel % g.q) * g.stride_w - g.pad_w;
      position_[i] = Position::of(work.pixel + row < g.pixels() ? h : Position::kOutside, w);
      const std::int64_t from = ((static_cast<std::int64_t>(images) * g.h + h) * g.w + w) * g.c;
      from_[i] = static_cast<Offset>(kAligned ? from / kElements : from);
    }
    const std::int64_t first_channel = static_cast<std::int64_t>(work.group) * g.group_k + work.channel;
    weight_ = static_cast<const T*>(args.weight) + first_channel * g.depth;
  }

  // Copies the next step to `stage`.
  FUSED_RESNET_DEVICE void copy(unsigned char* stage) {
    const Tap tap(g_, depth_);
#pragma unroll
    for (int i = 0; i < kRowsA; ++i)
      copy_pixel(stage + swizzled(row_ + i * Tile::kCopyRows, chunk_), i, tap);
    stage += Tile::kM * kRowBytes;
#pragma unroll
    for (int i = 0; i < kRowsB; ++i) {
      const int row = row_ + i * Tile::kCopyRows;
      const bool inside = at_ < g_.depth && row < channels_;
      cp_async16(stage + swizzled(row, chunk_), weight_ + (inside ? row * g_.depth + at_ : 0), inside);
    }
    at_ += kStep;
    depth_.advance(g_, kStep);
  }

 private:
  // In registers these are most of what a thread has beside the sums. From the tile's first image chunks are counted in
  // 32 bits, which is 32 GB, and elements, where they are no chunks, in 64.
  using Offset = std::conditional_t<kAligned, int, std::int64_t>;

  // What is added to a pixel's row, column and offset to come to a tap's; outside of the filter, to none in the image.
  struct Tap {
    int h, w;
    Offset offset;

    FUSED_RESNET_DEVICE Tap(const ConvShape& g, const Depth& d)
        : h(d.r < g.r ? d.r * g.dilation_h : INT16_MAX * 2),
          w(d.s * g.dilation_w),
          offset((static_cast<Offset>(h) * g.w + w) * (kAligned ? g.c / kElements : g.c) +
                 (kAligned ? d.c / kElements : d.c)) {}
  };

  FUSED_RESNET_DEVICE bool inside(int i, const Tap& tap) const {
    const auto h = static_cast<unsigned>(position_[i].h() + tap.h), w = static_cast<unsigned>(position_[i].w() + tap.w);
    return h < static_cast<unsigned>(g_.h) && w < static_cast<unsigned>(g_.w);
  }

  FUSED_RESNET_DEVICE void copy_pixel(unsigned char* to, int i, const Tap& tap) const {
    if constexpr (kAligned) {
      const bool valid = inside(i, tap);
      cp_async16(to, x_ + static_cast<std::int64_t>(valid ? from_[i] + tap.offset : 0) * kElements, valid);
    } else {
      Pack<T, kElements> chunk;
      Depth d = depth_;
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        const Tap here(g_, d);
        chunk.data[e] = inside(i, here) ? x_[from_[i] + here.offset] : static_cast<T>(0.0f);
        d.advance(g_, 1);
      }
      store_pack(reinterpret_cast<T*>(to), chunk);
    }
  }

  const ConvShape& g_;
  int row_, chunk_, at_;
  Depth depth_;
  int channels_;
  const T* x_;
  Position position_[kRowsA];
  Offset from_[kRowsA];
  const T* weight_;
};

}  // namespace fused_resnet::cuda
