// The training operators on the CPU. Tensors are dense channels_last, float32 or bfloat16 (per-channel vectors and
// statistics float32), and validated by the Python layer; outputs are allocated there. Empty ones are left alone.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace fused_resnet::cpu {

using torch::stable::Tensor;

// mean and biased variance of the channels of x
void bn_moments(Tensor x, Tensor mean, Tensor var);

// y = act(norm(x) + residual), the residual through its own norm where residual_mean is there;
// norm(x) = (x - mean) / sqrt(var + eps) * weight + bias
void norm_act(Tensor x, Tensor mean, Tensor var, std::optional<Tensor> weight, std::optional<Tensor> bias, double eps,
              std::optional<Tensor> residual, std::optional<Tensor> residual_mean, std::optional<Tensor> residual_var,
              std::optional<Tensor> residual_weight, std::optional<Tensor> residual_bias, double residual_eps,
              std::int64_t act, Tensor y);

// Its gradient in two passes. g = dy * act', the slope told from y where it is there (ReLU, ReLU6), else from x and the
// residual. The first pass sums for the parameters, and stores g where one is given: the second can then take that as
// its dy, with no activation.
void norm_act_reduce(Tensor dy, Tensor x, Tensor mean, Tensor var, std::optional<Tensor> weight,
                     std::optional<Tensor> bias, double eps, std::optional<Tensor> residual,
                     std::optional<Tensor> residual_mean, std::optional<Tensor> residual_var,
                     std::optional<Tensor> residual_weight, std::optional<Tensor> residual_bias, double residual_eps,
                     std::optional<Tensor> y, std::int64_t act, std::optional<Tensor> g, Tensor dweight, Tensor dbias,
                     std::optional<Tensor> dresidual_weight);
void norm_act_input_grad(Tensor dy, Tensor x, Tensor mean, Tensor var, std::optional<Tensor> weight,
                         std::optional<Tensor> bias, double eps, std::optional<Tensor> residual,
                         std::optional<Tensor> residual_mean, std::optional<Tensor> residual_var,
                         std::optional<Tensor> residual_weight, std::optional<Tensor> residual_bias,
                         double residual_eps, std::optional<Tensor> y, std::int64_t act, Tensor dweight, Tensor dbias,
                         std::optional<Tensor> dresidual_weight, double count, Tensor dx,
                         std::optional<Tensor> dresidual);

// out = act(x * scale + shift + residual)
void scale_act(Tensor x, Tensor scale, Tensor shift, std::optional<Tensor> residual, std::int64_t act, Tensor out);
void add_act_fwd(Tensor x, Tensor residual, std::int64_t act, Tensor y);
void add_act_bwd(Tensor dy, std::optional<Tensor> y, std::optional<Tensor> x, std::optional<Tensor> residual,
                 std::int64_t act, Tensor dx);

}  // namespace fused_resnet::cpu
