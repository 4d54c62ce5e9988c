// Max pooling: alone, and of a batch norm + activation that is never in memory. aten's keeps an index of 8 bytes for
// each output; here it is the number r * S + s of the tap, in a byte, and only where a backward pass follows.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace fused_resnet::cpu {

using torch::stable::Tensor;

struct Pool {
  std::int64_t channels, h, w, p, q, r, s, stride_h, stride_w, pad_h, pad_w;

  // Sizes of x and of the output. geometry: kernel, stride and padding, each (height, width); the padding is at most
  // half of the kernel, so that every window has a pixel.
  Pool(const Tensor& x, const Tensor& out, const std::vector<std::int64_t>& geometry);

  void check_argmax(const Tensor& argmax) const;
};

// The gradient of a max pool's output, and who gets it.
struct PooledGradient {
  Pool pool;
  const void* dy;              // [N, P, Q, C]
  const std::uint8_t* argmax;  // [N, P, Q, C]
  bool bf16;

  PooledGradient(const Tensor& x, const Tensor& dy, const Tensor& argmax, const std::vector<std::int64_t>& geometry);
};

// x and out dense channels_last, fp32 or bf16. Of equal taps the first is taken, and NaN before any, as in aten.
void max_pool(Tensor x, std::vector<std::int64_t> geometry, Tensor out, std::optional<Tensor> argmax);

// out = max_pool(act(norm(x))), act(norm(x)) rounded to the dtype before it is compared, as it would be in memory
void norm_act_max_pool(Tensor x, Tensor mean, Tensor var, std::optional<Tensor> weight, std::optional<Tensor> bias,
                       double eps, std::int64_t act, std::vector<std::int64_t> geometry, Tensor out, Tensor argmax);

// dx = for each pixel, the sum of the gradients of the windows that took it: in fp32 and in the order of the windows
void max_pool_bwd(Tensor dy, Tensor argmax, std::vector<std::int64_t> geometry, Tensor dx);

// norm_act_reduce and norm_act_input_grad of norm_act_max_pool, dy being the gradient of its output
void norm_act_max_pool_reduce(Tensor dy, Tensor argmax, Tensor x, Tensor mean, Tensor var, std::optional<Tensor> weight,
                              std::optional<Tensor> bias, double eps, std::int64_t act,
                              std::vector<std::int64_t> geometry, Tensor dweight, Tensor dbias);
void norm_act_max_pool_input_grad(Tensor dy, Tensor argmax, Tensor x, Tensor mean, Tensor var,
                                  std::optional<Tensor> weight, std::optional<Tensor> bias, double eps,
                                  std::int64_t act, std::vector<std::int64_t> geometry, Tensor dweight, Tensor dbias,
                                  double count, Tensor dx);

}  // namespace fused_resnet::cpu
