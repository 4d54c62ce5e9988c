// What bn_act.cpp hands to its kernels. x, dy, y, residual and the outputs are all rows of `channels` elements; the
// vectors hold a float per channel and may be read to the next multiple of kChannelPad.
#pragma once

#include <cstdint>

namespace fused_resnet::cpu {

constexpr std::int64_t kTileChannels = 512;  // at most: long rows suit the hardware's prefetcher

struct BnActArgs {
  const void* x = nullptr;
  const void* dy = nullptr;
  const void* y = nullptr;
  const void* residual = nullptr;
  void* out = nullptr;        // y in forward, dx in backward
  void* dresidual = nullptr;  // g: written by the reduction, read by the input gradient
  std::int64_t channels = 0;
  int act = 0;
  bool bf16 = false;
  bool stream = false;            // write out past the caches
  const float* centre = nullptr;  // the mean, or any value near it while it is not known
  const float* scale = nullptr;   // pre-activation = (x - centre) * scale + shift + residual
  const float* shift = nullptr;
  const float* mean_g = nullptr;  // dx = scale * (g - mean_g - (x - centre) * slope)
  const float* slope = nullptr;
};

struct BnTile {
  std::int64_t row, rows, channel, channels;
};

}  // namespace fused_resnet::cpu
