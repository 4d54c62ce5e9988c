// Compiles the kernels in the file named by FUSED_RESNET_KERNELS once per instruction set, from one source, in the
// namespaces avx512, avx2 and portable. Include this outside every namespace, after every other header: a standard
// header read inside a target region would hand its inline functions to processors that cannot run them.

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/cpu.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")
#endif
namespace fused_resnet::cpu::avx512 {
constexpr int kLanes = 16;
#include "cpu/vec.h"
// The order matters: the formulas are written in vectors, kernels in both.
#include "cpu/types.h"
#include "pointwise.h"
#include FUSED_RESNET_KERNELS
}  // namespace fused_resnet::cpu::avx512
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace fused_resnet::cpu::avx2 {
constexpr int kLanes = 8;
#include "cpu/vec.h"
// The order matters, as above.
#include "cpu/types.h"
#include "pointwise.h"
#include FUSED_RESNET_KERNELS
}  // namespace fused_resnet::cpu::avx2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // x86-64

namespace fused_resnet::cpu::portable {
constexpr int kLanes = 4;
#include "cpu/vec.h"
// The order matters, as above.
#include "cpu/types.h"
#include "pointwise.h"
#include FUSED_RESNET_KERNELS
}  // namespace fused_resnet::cpu::portable

#undef FUSED_RESNET_KERNELS

// The kernel `name` compiled for the processor that runs.
#if defined(__x86_64__)
#define FUSED_RESNET_PICK(name)                              \
  (::fused_resnet::cpu::isa() >= Isa::kAvx512 ? avx512::name \
   : ::fused_resnet::cpu::isa() == Isa::kAvx2 ? avx2::name   \
                                              : portable::name)
#else
#define FUSED_RESNET_PICK(name) (portable::name)
#endif
