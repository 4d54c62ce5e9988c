// What the CPU kernels share: the instruction sets that they are compiled for, chosen when the library runs.
#pragma once

#include <string>

namespace fused_resnet::cpu {

enum class Isa { kScalar, kAvx2, kAvx512, kAvx512Bf16, kAmx };

// The best set that this processor and operating system offer; FUSED_RESNET_CPU_ISA (scalar, avx2, avx512, avx512_bf16,
// amx) caps it, so that every path can be tested on one machine. Read once.
Isa isa();

std::string cpu_capability();

}  // namespace fused_resnet::cpu
