#include "cpu/cpu.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fused_resnet::cpu {
namespace {

constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "avx512_bf16", "amx"};

#if defined(__x86_64__)
// Linux gives the 8 KB of tile registers to a process only after it has asked for them.
bool request_amx() {
#if defined(__linux__)
  constexpr long kArchReqXcompPerm = 0x1023, kXfeatureXtiledata = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
#else
  return false;
#endif
}
#endif

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::kScalar;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
    return Isa::kAvx2;
  if (!__builtin_cpu_supports("avx512bf16")) return Isa::kAvx512;
  unsigned a = 7, b = 0, c = 0, d = 0;
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  const bool amx = (d >> 22 & 1) && (d >> 24 & 1);  // AMX-BF16, AMX-TILE
  return amx && request_amx() ? Isa::kAmx : Isa::kAvx512Bf16;
#else
  return Isa::kScalar;
#endif
}

Isa capped() {
  const Isa found = detect();
  const char* cap = std::getenv("FUSED_RESNET_CPU_ISA");
  for (int i = 0; cap && i < 5; ++i)
    if (std::strcmp(cap, kNames[i]) == 0) return std::min(found, static_cast<Isa>(i));
  return found;
}

}  // namespace

Isa isa() {
  static const Isa value = capped();
  return value;
}

std::string cpu_capability() {
  return kNames[static_cast<int>(isa())];
}

}  // namespace fused_resnet::cpu
