// The operators on CUDA. Tensors are dense channels_last of one device, float32, bfloat16 or float16, their addresses
// multiples of 16 (per-channel vectors, statistics and workspaces float32), and none of them is empty: arguments.h
// refuses others. Outputs and workspaces are allocated by the Python layer.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace fused_resnet::cuda {

using torch::stable::Tensor;

// Why the driver of this machine cannot run the kernels; empty: it can.
std::string driver_lacking();

void add_act_fwd(Tensor x, Tensor residual, std::int64_t act, Tensor y);
void add_act_bwd(Tensor dy, std::optional<Tensor> y, std::optional<Tensor> x, std::optional<Tensor> residual,
                 std::int64_t act, Tensor dx);

// weight: [K, depth], each filter [R, S, C / groups] and filled up with zeros to a multiple of 16 bytes. geometry: R,
// S, and height and width of stride, padding and dilation, then groups. tf32: fp32 products may be rounded so. The tile
// is one of `find_tile`'s. sums, [splits, pixels, K]: the depth is split, and added up by a second kernel. partials,
// [tiles of pixels, 3, K]: the moments of out, whose statistics batch norm wants.
void conv(Tensor x, Tensor weight, std::optional<Tensor> scale, std::optional<Tensor> shift,
          std::optional<Tensor> residual, std::vector<std::int64_t> geometry, std::int64_t act, bool tf32,
          std::int64_t tile_m, std::int64_t tile_n, Tensor out, std::optional<Tensor> sums,
          std::optional<Tensor> partials);

// Of the special ones weights are packed by the Python layer too; geometry is window, stride, padding and dilation,
// each (height, width). A depthwise tile is the rows and channels of a thread, and the warps of a block.
void depthwise_fwd(Tensor x, Tensor weight, std::optional<Tensor> scale, std::optional<Tensor> shift,
                   std::optional<Tensor> residual, std::vector<std::int64_t> geometry, std::vector<std::int64_t> tile,
                   std::int64_t act, Tensor out);
void depthwise_dgrad(Tensor grad, Tensor weight, std::vector<std::int64_t> geometry, std::vector<std::int64_t> tile,
                     Tensor dx);
void depthwise_wgrad(Tensor grad, Tensor x, std::vector<std::int64_t> geometry, Tensor workspace, Tensor dweight);

// The first layer's. A tile is rows, columns, 16 pixels a warp's times (2 or 4), and channels (32 or 64).
void stem(Tensor x, Tensor weight, Tensor scale, Tensor shift, std::optional<Tensor> residual,
          std::vector<std::int64_t> geometry, std::vector<std::int64_t> tile, bool tf32, std::int64_t act, Tensor out);

// A tile of rows (pixels) has tile_rows of them, the last one what is left; partials hold, for every tile and channel,
// the mean in two parts and the variance (bn_stats), or the sums of g, of g * (x - mean) and, where the residual has a
// batch norm of its own (which then is its mean and var, weight and bias), of g * (residual - its mean) (bn_reduce).
// The slope is told from the mask, else from y, else from x and the residual; g is the gradient behind it. count: the
// values of a channel that dweight and dbias are sums over. A mask has a byte for every access, of 16 bytes where the
// channels are a multiple of that and else of one element, and in it a bit an element.
void bn_stats(Tensor x, std::int64_t tile_rows, Tensor partials);
void bn_finalize(Tensor partials, std::int64_t rows, std::int64_t tile_rows, Tensor mean, Tensor var);
void bn_apply(Tensor x, Tensor mean, Tensor var, std::optional<Tensor> weight, std::optional<Tensor> bias, double eps,
              std::optional<Tensor> residual, std::optional<Tensor> residual_mean, std::optional<Tensor> residual_var,
              std::optional<Tensor> residual_weight, std::optional<Tensor> residual_bias, double residual_eps,
              std::int64_t act, Tensor y, std::optional<Tensor> mask);
void bn_reduce(Tensor dy, Tensor x, Tensor mean, Tensor var, std::optional<Tensor> weight, std::optional<Tensor> bias,
               double eps, std::optional<Tensor> residual, std::optional<Tensor> residual_mean,
               std::optional<Tensor> residual_var, std::optional<Tensor> residual_weight,
               std::optional<Tensor> residual_bias, double residual_eps, std::int64_t act, std::optional<Tensor> y,
               std::optional<Tensor> mask, std::int64_t tile_rows, Tensor partials, std::optional<Tensor> g);
void bn_reduce_finalize(Tensor partials, Tensor var, double eps, std::optional<Tensor> residual_var,
                        double residual_eps, Tensor dweight, Tensor dbias, std::optional<Tensor> dresidual_weight);
void bn_input_grad(Tensor dy, Tensor x, Tensor mean, Tensor var, std::optional<Tensor> weight,
                   std::optional<Tensor> bias, double eps, std::optional<Tensor> residual,
                   std::optional<Tensor> residual_mean, std::optional<Tensor> residual_var,
                   std::optional<Tensor> residual_weight, std::optional<Tensor> residual_bias, double residual_eps,
                   std::int64_t act, std::optional<Tensor> y, std::optional<Tensor> mask, Tensor dweight, Tensor dbias,
                   std::optional<Tensor> dresidual_weight, double count, Tensor dx, std::optional<Tensor> dresidual);
void scale_act(Tensor x, Tensor scale, Tensor shift, std::optional<Tensor> residual, std::int64_t act, Tensor out);

// geometry: kernel, stride and padding, each (height, width); argmax, [N, P, Q, C], has the taken tap's number in a
// byte. bn_max_pool and its gradient are those of max_pool(act(batch norm)), the activation a clamp.
void max_pool(Tensor x, std::vector<std::int64_t> geometry, Tensor out, std::optional<Tensor> argmax);
void max_pool_bwd(Tensor dy, Tensor argmax, std::vector<std::int64_t> geometry, Tensor dx);
void bn_max_pool(Tensor x, Tensor mean, Tensor var, std::optional<Tensor> weight, std::optional<Tensor> bias,
                 double eps, std::int64_t act, std::vector<std::int64_t> geometry, Tensor out,
                 std::optional<Tensor> argmax);
void bn_max_pool_reduce(Tensor dy, Tensor argmax, std::vector<std::int64_t> geometry, Tensor x, Tensor mean, Tensor var,
                        std::optional<Tensor> weight, std::optional<Tensor> bias, double eps, std::int64_t act,
                        std::int64_t tile_rows, Tensor partials);
void bn_max_pool_input_grad(Tensor dy, Tensor argmax, std::vector<std::int64_t> geometry, Tensor x, Tensor mean,
                            Tensor var, std::optional<Tensor> weight, std::optional<Tensor> bias, double eps,
                            std::int64_t act, Tensor dweight, Tensor dbias, double count, Tensor dx);

// Registers each of them under its name in the namespace fused_resnet_C.
#define FUSED_RESNET_CUDA_OPERATORS(m)                                                   \
  m.impl("cuda_add_act_fwd", TORCH_BOX(&fused_resnet::cuda::add_act_fwd));               \
  m.impl("cuda_add_act_bwd", TORCH_BOX(&fused_resnet::cuda::add_act_bwd));               \
  m.impl("cuda_conv", TORCH_BOX(&fused_resnet::cuda::conv));                             \
  m.impl("cuda_depthwise_fwd", TORCH_BOX(&fused_resnet::cuda::depthwise_fwd));           \
  m.impl("cuda_depthwise_dgrad", TORCH_BOX(&fused_resnet::cuda::depthwise_dgrad));       \
  m.impl("cuda_depthwise_wgrad", TORCH_BOX(&fused_resnet::cuda::depthwise_wgrad));       \
  m.impl("cuda_stem", TORCH_BOX(&fused_resnet::cuda::stem));                             \
  m.impl("cuda_bn_stats", TORCH_BOX(&fused_resnet::cuda::bn_stats));                     \
  m.impl("cuda_bn_finalize", TORCH_BOX(&fused_resnet::cuda::bn_finalize));               \
  m.impl("cuda_bn_apply", TORCH_BOX(&fused_resnet::cuda::bn_apply));                     \
  m.impl("cuda_bn_reduce", TORCH_BOX(&fused_resnet::cuda::bn_reduce));                   \
  m.impl("cuda_bn_reduce_finalize", TORCH_BOX(&fused_resnet::cuda::bn_reduce_finalize)); \
  m.impl("cuda_bn_input_grad", TORCH_BOX(&fused_resnet::cuda::bn_input_grad));           \
  m.impl("cuda_scale_act", TORCH_BOX(&fused_resnet::cuda::scale_act));                   \
  m.impl("cuda_max_pool", TORCH_BOX(&fused_resnet::cuda::max_pool));                     \
  m.impl("cuda_max_pool_bwd", TORCH_BOX(&fused_resnet::cuda::max_pool_bwd));             \
  m.impl("cuda_bn_max_pool", TORCH_BOX(&fused_resnet::cuda::bn_max_pool));               \
  m.impl("cuda_bn_max_pool_reduce", TORCH_BOX(&fused_resnet::cuda::bn_max_pool_reduce)); \
  m.impl("cuda_bn_max_pool_input_grad", TORCH_BOX(&fused_resnet::cuda::bn_max_pool_input_grad))

}  // namespace fused_resnet::cuda
