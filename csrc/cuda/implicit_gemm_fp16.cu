#include "cuda/implicit_gemm.h"

namespace fused_resnet::cuda {

ConvLaunch find_fp16_tile(std::int64_t m, std::int64_t n, bool aligned) {
  return find_tile<Arithmetic<Half, Products::kHalf>>(m, n, aligned);
}

}  // namespace fused_resnet::cuda
