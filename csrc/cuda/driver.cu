// Whether this machine's driver can run the kernels.

#include "cuda/kernels.h"

#if !defined(FUSED_RESNET_EMULATED)
#include <cuda_runtime_api.h>
#endif

namespace fused_resnet::cuda {

// The CUDA runtime is linked into the library: a driver of another torch's, older CUDA does for that torch and not for
// it. Asking needs no driver, and starts none.
std::string driver_lacking() {
#if defined(FUSED_RESNET_EMULATED)
  return "";
#else
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
  constexpr int kMajor = CUDART_VERSION / 1000;  // any driver of one runs all of its minor versions
  if (driver == 0) return "no NVIDIA driver is here";
  if (driver / 1000 >= kMajor) return "";
  return "the NVIDIA driver is older than CUDA " + std::to_string(kMajor) +
         ".0, which the kernels were built with: it has CUDA " + std::to_string(driver / 1000) + "." +
         std::to_string(driver % 1000 / 10);
#endif
}

}  // namespace fused_resnet::cuda
