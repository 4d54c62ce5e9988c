// How every CUDA operator starts its kernels: on the tensor's device, on PyTorch's current stream, checked, without a
// synchronisation, and so safe while a graph is captured. All memory comes from the caller.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>

#include "cuda/arguments.h"
#include "cuda/device.h"

#if !defined(FUSED_RESNET_EMULATED)
// A torch without CUDA does not have it: the library must load there too.
#pragma weak aoti_torch_get_current_cuda_stream
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace fused_resnet::cuda {

#if !defined(FUSED_RESNET_EMULATED)
// torch's own check is not in a torch without CUDA.
inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // it is told here, and by no later call
  STD_TORCH_CHECK(false, "CUDA: ", what, " failed: ", cudaGetErrorString(error));
}
#endif

constexpr std::size_t kSharedByDefault = 48 << 10;  // what a block may take without asking for more

inline const void* data_or_null(const std::optional<Tensor>& t) {
  return t ? t->const_data_ptr() : nullptr;
}

inline float* floats(const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, "per-channel vectors and workspaces are float32");
  return static_cast<float*>(t.mutable_data_ptr());
}

inline const float* floats(const std::optional<Tensor>& t) {
  return t ? floats(*t) : nullptr;
}

// Calls body(T{}) with the element type of `t`.
template <class Body>
void with_dtype(const Tensor& t, const Body& body) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::BFloat16:
      return body(Bf16{});
    case ScalarType::Half:
      return body(Half{});
    default:
      STD_TORCH_CHECK(false, "expected float32, bfloat16 or float16");
  }
}

// Calls body(std::integral_constant<int, kAct>) with the activation.
template <class Body>
void with_act(std::int64_t act, const Body& body) {
  switch (act) {
    case kNone:
      return body(std::integral_constant<int, kNone>{});
    case kRelu:
      return body(std::integral_constant<int, kRelu>{});
    case kRelu6:
      return body(std::integral_constant<int, kRelu6>{});
    case kHardswish:
      return body(std::integral_constant<int, kHardswish>{});
    case kSilu:
      return body(std::integral_constant<int, kSilu>{});
    default:
      STD_TORCH_CHECK(false, "unknown activation");
  }
}

// Calls body(integral constant) with the elements of an access: as many as fit in 16 bytes where `count` is a multiple
// of them, else one.
template <class T, class Body>
void with_width(std::int64_t count, const Body& body) {
  count % kWide<T> == 0 ? body(std::integral_constant<int, kWide<T>>{}) : body(std::integral_constant<int, 1>{});
}

// Makes the device of a tensor the current one for as long as it lives, and launches on its current stream.
class Launcher {
 public:
  explicit Launcher(const Tensor& t) : device_(t.get_device_index()), guard_(device_) {
#if !defined(FUSED_RESNET_EMULATED)
    STD_TORCH_CHECK(t.is_cuda(), "expected CUDA tensors");
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch was built without CUDA");
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream_));
#endif
  }

  // Launches kernel(args...) on that many blocks of threads, each with so many bytes of shared memory.
  template <class... Params, class... Args>
  void operator()(void (*kernel)(Params...), std::int64_t blocks, int threads, std::size_t shared, Args... args) const {
    if (blocks == 0) return;
    STD_TORCH_CHECK(blocks <= INT32_MAX, "more blocks than a grid has");
#if defined(FUSED_RESNET_EMULATED)
    emulator::launch(static_cast<int>(blocks), threads, shared, [&] { kernel(static_cast<Params>(args)...); });
#else
    if (shared > kSharedByDefault &&
        (shared > INT32_MAX || cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                    static_cast<int>(shared)) != cudaSuccess))
      refuse_shared(shared);
    cudaLaunchConfig_t config{};
    config.gridDim = static_cast<unsigned>(blocks);
    config.blockDim = static_cast<unsigned>(threads);
    config.dynamicSmemBytes = shared;
    config.stream = static_cast<cudaStream_t>(stream_);
    check(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...), "the launch");
#endif
  }

 private:
#if !defined(FUSED_RESNET_EMULATED)
  void refuse_shared(std::size_t asked) const {
    const cudaError_t error = cudaGetLastError();
    int most = 0;
    check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device_), "cudaDeviceGetAttribute");
    STD_TORCH_CHECK(false, "CUDA: a block takes ", asked, " bytes of shared memory, of ", most, " that device ",
                    device_, " has: ", cudaGetErrorString(error));
  }
#endif

  std::int32_t device_;
#if defined(FUSED_RESNET_EMULATED)
  emulator::NoGuard guard_;
#else
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
#endif
};

}  // namespace fused_resnet::cuda
