// csrc/cuda/device.h for the CPU: the same names, so that the tests run the kernels themselves, whole grids of them.
//
// The threads of a block are fibers of one thread of the system. Each runs until it has to wait: at a barrier of the
// block, or where a warp does something together. Shared memory and what cp.async has not delivered are NaN; a copy is
// done when its thread waits for it, and no sooner. Barriers that some threads miss, warps that part, and addresses
// outside of the block's shared memory are errors, and so is what a GPU would refuse: accesses that are not aligned,
// and more shared memory than a block has. `order` says which warp runs first: a kernel whose result depends on it
// lacks a barrier.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __launch_bounds__(...)
#define FUSED_RESNET_HOST_DEVICE inline
#define FUSED_RESNET_DEVICE inline

namespace emulator {

constexpr std::size_t kMostShared = 163 << 10;  // bytes that a block has on sm_80

struct Index {
  unsigned x = 0;
};

inline Index thread_index, block_index, block_size, grid_size;

enum class Wait { kNothing, kBlock, kWarp, kDone };

// What lane `lane` brings to, and takes from, something that its warp does together.
struct Exchange {
  const char* name;
  void (*run)(Exchange* const* lanes);
  const void* in[3];
  void* out;
};

void launch(int blocks, int threads, std::size_t shared, const std::function<void()>& body);
void wait_for_block();
void wait_for_warp(Exchange& exchange);
unsigned char* block_memory();
void check_shared(const void* address, int bytes);
[[noreturn]] void fail_alignment();
void copy_later(void* shared, const void* global, bool valid);
void commit();
void wait_for_copies(int pending);

struct NoGuard {
  explicit NoGuard(std::int32_t) {}
};

}  // namespace emulator

#define threadIdx ::emulator::thread_index
#define blockIdx ::emulator::block_index
#define blockDim ::emulator::block_size
#define gridDim ::emulator::grid_size
#define __syncthreads ::emulator::wait_for_block

namespace fused_resnet::cuda {

inline unsigned char* block_memory() {
  return emulator::block_memory();
}

inline void cp_async16(void* shared, const void* global, bool valid) {
  emulator::check_shared(shared, 16);
  emulator::copy_later(shared, global, valid);
}

inline void cp_async_commit() {
  emulator::commit();
}

template <int kPending>
void cp_async_wait() {
  emulator::wait_for_copies(kPending);
}

inline float as_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline std::uint32_t as_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline void ldmatrix_x4(std::uint32_t (&r)[4], const void* shared) {
  emulator::check_shared(shared, 16);
  emulator::Exchange exchange{"ldmatrix",
                              [](emulator::Exchange* const* lanes) {
                                for (int lane = 0; lane < 32; ++lane)
                                  for (int m = 0; m < 4; ++m) {
                                    const void* row = lanes[8 * m + lane / 4]->in[0];
                                    std::memcpy(static_cast<std::uint32_t*>(lanes[lane]->out) + m,
                                                static_cast<const char*>(row) + 4 * (lane % 4), 4);
                                  }
                              },
                              {shared},
                              r};
  emulator::wait_for_warp(exchange);
}

// As tensor cores do it (Fasi et al. 2021, doi 10.7717/peerj-cs.330), without their few bits more or less.
inline float cut_off(double value) {
  const float nearest = static_cast<float>(value);
  return std::fabs(nearest) > std::fabs(value) && std::isfinite(value) ? std::nextafter(nearest, 0.0f) : nearest;
}

// d += a * b of fragments as csrc/cuda/device.h describes them, kPer elements in each 4 bytes.
template <int kPer, class Widen>
void multiply(emulator::Exchange* const* lanes) {
  constexpr int kDepth = 8 * kPer;
  static float a[16][kDepth], b[8][kDepth];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* a4 = static_cast<const std::uint32_t*>(lanes[lane]->in[0]);
    const auto* b2 = static_cast<const std::uint32_t*>(lanes[lane]->in[1]);
    for (int i = 0; i < 4; ++i)
      for (int e = 0; e < kPer; ++e)
        a[lane / 4 + i % 2 * 8][(lane % 4 + i / 2 * 4) * kPer + e] = Widen()(a4[i], e);
    for (int i = 0; i < 2; ++i)
      for (int e = 0; e < kPer; ++e)
        b[lane / 4][(lane % 4 + i * 4) * kPer + e] = Widen()(b2[i], e);
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      double sum = static_cast<float*>(lanes[lane]->out)[i];
      const float *row = a[lane / 4 + i / 2 * 8], *column = b[lane % 4 * 2 + i % 2];
      for (int k = 0; k < kDepth; ++k)
        sum += static_cast<double>(row[k]) * column[k];
      static_cast<float*>(lanes[lane]->out)[i] = cut_off(sum);
    }
}

template <class T>
struct WidenHalf {
  float operator()(std::uint32_t bits, int e) const {
    const auto half = static_cast<std::uint16_t>(bits >> 16 * e);
    T value;
    std::memcpy(&value, &half, sizeof value);
    return static_cast<float>(value);
  }
};

struct WidenTf32 {
  float operator()(std::uint32_t bits, int) const { return as_float(bits & 0xffffe000u); }
};

template <class T>
void mma(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  const std::uint32_t b[2] = {b0, b1};
  emulator::Exchange exchange{"mma", multiply<2, WidenHalf<T>>, {a, b}, d};
  emulator::wait_for_warp(exchange);
}

inline void mma_tf32(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  const std::uint32_t b[2] = {b0, b1};
  emulator::Exchange exchange{"mma_tf32", multiply<1, WidenTf32>, {a, b}, d};
  emulator::wait_for_warp(exchange);
}

inline std::uint32_t to_tf32(float value) {
  const std::uint32_t bits = as_bits(value);
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits;  // Inf and NaN
  return (bits + 0x1000u) & 0xffffe000u;
}

inline float exponential(float value) {
  return std::exp(value);
}

inline void check_aligned(const void* address, std::size_t bytes) {
  if (reinterpret_cast<std::uintptr_t>(address) % bytes) emulator::fail_alignment();
}

}  // namespace fused_resnet::cuda
