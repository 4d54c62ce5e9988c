#include "cuda/implicit_gemm.h"

namespace fused_resnet::cuda {

ConvLaunch find_fp32_tile(std::int64_t m, std::int64_t n, bool aligned) {
  return find_tile<Arithmetic<float, Products::kFp32>>(m, n, aligned);
}

}  // namespace fused_resnet::cuda
