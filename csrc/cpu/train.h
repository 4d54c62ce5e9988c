// The training operators on the CPU. Tensors are dense channels_last, float32 or bfloat16 (per-channel vectors and
// statistics float32), and validated by the Python layer; outputs are allocated there. Empty ones are left alone.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace fused_resnet::cpu {

using torch::stable::Tensor;

void bn_act_fwd(Tensor x, std::optional<Tensor> weight, std::optional<Tensor> bias, std::optional<Tensor> residual,
                double eps, std::int64_t act, Tensor y, Tensor mean, Tensor var);
void bn_act_bwd(Tensor dy, Tensor x, std::optional<Tensor> y, std::optional<Tensor> residual,
                std::optional<Tensor> weight, std::optional<Tensor> bias, Tensor mean, Tensor var, double eps,
                std::int64_t act, std::optional<Tensor> dx, Tensor dweight, Tensor dbias,
                std::optional<Tensor> dresidual);
void scale_act(Tensor x, Tensor scale, Tensor shift, std::optional<Tensor> residual, std::int64_t act, Tensor out);
void add_act_fwd(Tensor x, Tensor residual, std::int64_t act, Tensor y);
void add_act_bwd(Tensor dy, std::optional<Tensor> y, std::optional<Tensor> x, std::optional<Tensor> residual,
                 std::int64_t act, Tensor dx);

}  // namespace fused_resnet::cpu
