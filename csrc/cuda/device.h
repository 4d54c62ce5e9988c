// What the kernels use of a GPU beyond C++: element types, asynchronous copies, matrix fragments.
// The tests compile the same kernels for the CPU against tests/emulator/device.h, which has the same names.
#pragma once

#include <cstdint>
#include <type_traits>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "act.h"
#include "moments.h"

#if defined(FUSED_RESNET_EMULATED)
#include "emulator/device.h"
#else
#include <cuda_runtime.h>

#define FUSED_RESNET_HOST_DEVICE __host__ __device__ __forceinline__
#define FUSED_RESNET_DEVICE __device__ __forceinline__

namespace fused_resnet::cuda {

// The block's shared memory, as large as the launch asked for.
FUSED_RESNET_DEVICE unsigned char* block_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

FUSED_RESNET_DEVICE std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes to shared memory, or zeroes where `valid` is false and `global`, which must still be an address of
// the tensor, is not read. Both are multiples of 16. They are there after cp_async_wait and a barrier.
FUSED_RESNET_DEVICE void cp_async16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}

FUSED_RESNET_DEVICE void cp_async_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Waits until at most kPending of the groups that this thread has committed are on their way.
template <int kPending>
FUSED_RESNET_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Four matrices of 8 rows of 16 bytes: lane i gives the address of row i % 8 of matrix i / 8, and gets of each matrix
// the 4 bytes 4 * (i % 4) of row i / 4.
FUSED_RESNET_DEVICE void ldmatrix_x4(std::uint32_t (&r)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared))
               : "memory");
}

// d[16, 8] += a[16, 32 bytes] * b[8, 32 bytes]^T in fp32, over 16 elements of 16 bits. Lane i has of d the elements
// (i / 4, 2 * (i % 4)), the next in the row, and both 8 rows below; of a the 4 bytes 4 * (i % 4) of row i / 4, of 8
// rows below, and both 16 bytes further on; of b the 4 bytes 4 * (i % 4) of row i / 4, and 16 bytes further on.
template <class T>
FUSED_RESNET_DEVICE void mma(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  if constexpr (std::is_same_v<T, torch::headeronly::BFloat16>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same of 8 elements of fp32, of which the tensor core reads the upper 19 bits.
FUSED_RESNET_DEVICE void mma_tf32(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// fp32 to the nearest TF32, ties away from zero, as the bits of an fp32.
FUSED_RESNET_DEVICE std::uint32_t to_tf32(float value) {
  std::uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(value));
  return bits;
}

FUSED_RESNET_DEVICE float as_float(std::uint32_t bits) {
  return __uint_as_float(bits);
}

FUSED_RESNET_DEVICE std::uint32_t as_bits(float value) {
  return __float_as_uint(value);
}

FUSED_RESNET_DEVICE float exponential(float value) {
  return expf(value);
}

// The GPU itself refuses an address that is no multiple of what is read or written there at once.
FUSED_RESNET_DEVICE void check_aligned(const void*, std::size_t) {}

}  // namespace fused_resnet::cuda
#endif

namespace fused_resnet::cuda {

using Bf16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

constexpr int kWarp = 32;  // threads

#include "pointwise.h"

// Calls body(std::integral_constant<int, kAct>) with an activation that is known when the kernel runs: a branch that is
// the same for all threads.
template <class Body>
FUSED_RESNET_DEVICE void for_act(int act, const Body& body) {
  switch (act) {
    case kRelu:
      return body(std::integral_constant<int, kRelu>{});
    case kRelu6:
      return body(std::integral_constant<int, kRelu6>{});
    case kHardswish:
      return body(std::integral_constant<int, kHardswish>{});
    case kSilu:
      return body(std::integral_constant<int, kSilu>{});
    default:
      return;
  }
}

// kN elements that are read and written at once, in up to 16 bytes.
template <class T, int kN>
struct alignas(sizeof(T) * kN) Pack {
  T data[kN];
};

template <class T, int kN>
FUSED_RESNET_DEVICE Pack<T, kN> load_pack(const T* pointer) {
  check_aligned(pointer, sizeof(Pack<T, kN>));
  return *reinterpret_cast<const Pack<T, kN>*>(pointer);
}

template <class T, int kN>
FUSED_RESNET_DEVICE void store_pack(T* pointer, const Pack<T, kN>& pack) {
  check_aligned(pointer, sizeof(pack));
  *reinterpret_cast<Pack<T, kN>*>(pointer) = pack;
}

// The same to global memory, where one instruction is to do it: the compiler may take an assignment apart into a store
// for each element.
template <class T, int kN>
FUSED_RESNET_DEVICE void store_global(T* pointer, const Pack<T, kN>& pack) {
#if !defined(FUSED_RESNET_EMULATED)
  if constexpr (sizeof(pack) == 16) {
    uint4 words;
    memcpy(&words, &pack, sizeof(words));
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"l"(__cvta_generic_to_global(pointer)), "r"(words.x),
                 "r"(words.y), "r"(words.z), "r"(words.w)
                 : "memory");
    return;
  } else if constexpr (sizeof(pack) == 8) {
    uint2 words;
    memcpy(&words, &pack, sizeof(words));
    asm volatile("st.global.v2.b32 [%0], {%1, %2};\n" ::"l"(__cvta_generic_to_global(pointer)), "r"(words.x),
                 "r"(words.y)
                 : "memory");
    return;
  }
#endif
  store_pack(pointer, pack);
}

// Elements of T in the widest access.
template <class T>
constexpr int kWide = 16 / static_cast<int>(sizeof(T));

FUSED_RESNET_HOST_DEVICE bool is_finite(float value) {
  return value - value == 0.0f;
}

FUSED_RESNET_HOST_DEVICE constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace fused_resnet::cuda
