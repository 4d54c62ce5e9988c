// The one registration file: every compiled kernel, in the private namespace that backends/cpu and backends/cuda
// call. The public operators, their schemas, fakes and gradients are defined in Python.

#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/conv_scale_act.h"
#include "cpu/conv_wgrad.h"
#include "cpu/cpu.h"
#include "cpu/max_pool.h"
#include "cpu/memory.h"
#include "cpu/train.h"
#include "cuda/kernels.h"

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  // Importing the module loads the library, which runs the registrations below. It holds nothing itself.
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}

// Raised with every change to the schemas below, here and in backends/cpu/extension.py: a library that an older or
// newer checkout has left beside the Python sources is then seen, and not called with arguments that it does not take.
static int64_t interface_number() {
  return 6;
}

static std::string cuda_architectures() {
#if defined(FUSED_RESNET_CUDA)
  return FUSED_RESNET_CUDA;
#else
  return "";
#endif
}

static std::string cuda_driver_lacking() {
#if defined(FUSED_RESNET_CUDA)
  return fused_resnet::cuda::driver_lacking();
#else
  return "";
#endif
}

STABLE_TORCH_LIBRARY(fused_resnet_C, m) {
  m.def("interface_number() -> int");

  // The widest vector extension that the running processor and the kernels share, by name.
  m.def("cpu_capability() -> str");
  m.def("empty_channels_last(int[] size, ScalarType dtype) -> Tensor");
  m.def("empty_cache() -> int");

  // Activations: 0 none, 1 ReLU, 2 ReLU6, 3 hardswish, 4 SiLU. Outputs are allocated by the caller.
  m.def("bn_moments(Tensor x, Tensor(a!) mean, Tensor(b!) var) -> ()");
  m.def(
      "norm_act(Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, Tensor? residual, "
      "Tensor? residual_mean, Tensor? residual_var, Tensor? residual_weight, Tensor? residual_bias, float "
      "residual_eps, int act, Tensor(a!) y) -> ()");
  m.def(
      "norm_act_reduce(Tensor dy, Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, "
      "Tensor? residual, Tensor? residual_mean, Tensor? residual_var, Tensor? residual_weight, Tensor? "
      "residual_bias, float residual_eps, Tensor? y, int act, Tensor(a!)? g, Tensor(b!) dweight, Tensor(c!) "
      "dbias, Tensor(d!)? dresidual_weight) -> ()");
  m.def(
      "norm_act_input_grad(Tensor dy, Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, "
      "Tensor? residual, Tensor? residual_mean, Tensor? residual_var, Tensor? residual_weight, Tensor? "
      "residual_bias, float residual_eps, Tensor? y, int act, Tensor dweight, Tensor dbias, Tensor? "
      "dresidual_weight, float count, Tensor(a!) dx, Tensor(b!)? dresidual) -> ()");
  m.def("scale_act(Tensor x, Tensor scale, Tensor shift, Tensor? residual, int act, Tensor(a!) out) -> ()");
  m.def("add_act_fwd(Tensor x, Tensor residual, int act, Tensor(a!) y) -> ()");
  m.def("add_act_bwd(Tensor dy, Tensor? y, Tensor? x, Tensor? residual, int act, Tensor(a!) dx) -> ()");
  m.def("conv_supported(int dtype_bits) -> bool");
  m.def("conv_pack(Tensor weight, bool lasting) -> Tensor");
  m.def(
      "conv_scale_act(Tensor x, Tensor packed, Tensor scale, Tensor shift, Tensor? residual, int[] geometry, int act, "
      "Tensor(a!) out) -> ()");
  m.def(
      "conv_wgrad(Tensor dy, Tensor x, Tensor? mean, Tensor? var, Tensor? weight, Tensor? bias, float eps, int act, "
      "int[] geometry, Tensor(a!) dweight) -> ()");
  m.def("max_pool(Tensor x, int[] geometry, Tensor(a!) out, Tensor(b!)? argmax) -> ()");
  m.def("max_pool_bwd(Tensor dy, Tensor argmax, int[] geometry, Tensor(a!) dx) -> ()");
  m.def(
      "norm_act_max_pool(Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, int act, "
      "int[] geometry, Tensor(a!) out, Tensor(b!) argmax) -> ()");
  m.def(
      "norm_act_max_pool_reduce(Tensor dy, Tensor argmax, Tensor x, Tensor mean, Tensor var, Tensor? weight, "
      "Tensor? bias, float eps, int act, int[] geometry, Tensor(a!) dweight, Tensor(b!) dbias) -> ()");
  m.def(
      "norm_act_max_pool_input_grad(Tensor dy, Tensor argmax, Tensor x, Tensor mean, Tensor var, Tensor? weight, "
      "Tensor? bias, float eps, int act, int[] geometry, Tensor dweight, Tensor dbias, float count, Tensor(a!) "
      "dx) -> ()");

  // CUDA: the compute capabilities that kernels were compiled for, such as "8.0+PTX;9.0a"; empty: none were built.
  m.def("cuda_architectures() -> str");
  // Why the driver of this machine cannot run them; empty: it can, or there are none.
  m.def("cuda_driver_lacking() -> str");
  m.def("cuda_add_act_fwd(Tensor x, Tensor residual, int act, Tensor(a!) y) -> ()");
  m.def("cuda_add_act_bwd(Tensor dy, Tensor? y, Tensor? x, Tensor? residual, int act, Tensor(a!) dx) -> ()");
  m.def(
      "cuda_conv(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, Tensor? residual, int[] geometry, int act, "
      "bool tf32, int tile_m, int tile_n, Tensor(a!) out, Tensor(b!)? sums, Tensor(c!)? partials) -> ()");
  m.def(
      "cuda_depthwise_fwd(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, Tensor? residual, int[] geometry, "
      "int[] tile, int act, Tensor(a!) out) -> ()");
  m.def("cuda_depthwise_dgrad(Tensor grad, Tensor weight, int[] geometry, int[] tile, Tensor(a!) dx) -> ()");
  m.def("cuda_depthwise_wgrad(Tensor grad, Tensor x, int[] geometry, Tensor(a!) workspace, Tensor(b!) dweight) -> ()");
  m.def(
      "cuda_stem(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? residual, int[] geometry, int[] tile, "
      "bool tf32, int act, Tensor(a!) out) -> ()");
  m.def("cuda_bn_stats(Tensor x, int tile_rows, Tensor(a!) partials) -> ()");
  m.def("cuda_bn_finalize(Tensor partials, int rows, int tile_rows, Tensor(a!) mean, Tensor(b!) var) -> ()");
  m.def(
      "cuda_bn_apply(Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, Tensor? residual, "
      "Tensor? residual_mean, Tensor? residual_var, Tensor? residual_weight, Tensor? residual_bias, "
      "float residual_eps, int act, Tensor(a!) y, Tensor(b!)? mask) -> ()");
  m.def(
      "cuda_bn_reduce(Tensor dy, Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, "
      "Tensor? residual, Tensor? residual_mean, Tensor? residual_var, Tensor? residual_weight, Tensor? residual_bias, "
      "float residual_eps, int act, Tensor? y, Tensor? mask, int tile_rows, Tensor(a!) partials, Tensor(b!)? g) "
      "-> ()");
  m.def(
      "cuda_bn_reduce_finalize(Tensor partials, Tensor var, float eps, Tensor? residual_var, float residual_eps, "
      "Tensor(a!) dweight, Tensor(b!) dbias, Tensor(c!)? dresidual_weight) -> ()");
  m.def(
      "cuda_bn_input_grad(Tensor dy, Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, "
      "Tensor? residual, Tensor? residual_mean, Tensor? residual_var, Tensor? residual_weight, Tensor? residual_bias, "
      "float residual_eps, int act, Tensor? y, Tensor? mask, Tensor dweight, Tensor dbias, Tensor? dresidual_weight, "
      "float count, Tensor(a!) dx, Tensor(b!)? dresidual) -> ()");
  m.def("cuda_scale_act(Tensor x, Tensor scale, Tensor shift, Tensor? residual, int act, Tensor(a!) out) -> ()");
  m.def("cuda_max_pool(Tensor x, int[] geometry, Tensor(a!) out, Tensor(b!)? argmax) -> ()");
  m.def("cuda_max_pool_bwd(Tensor dy, Tensor argmax, int[] geometry, Tensor(a!) dx) -> ()");
  m.def(
      "cuda_bn_max_pool(Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, int act, "
      "int[] geometry, Tensor(a!) out, Tensor(b!)? argmax) -> ()");
  m.def(
      "cuda_bn_max_pool_reduce(Tensor dy, Tensor argmax, int[] geometry, Tensor x, Tensor mean, Tensor var, "
      "Tensor? weight, Tensor? bias, float eps, int act, int tile_rows, Tensor(a!) partials) -> ()");
  m.def(
      "cuda_bn_max_pool_input_grad(Tensor dy, Tensor argmax, int[] geometry, Tensor x, Tensor mean, Tensor var, "
      "Tensor? weight, Tensor? bias, float eps, int act, Tensor dweight, Tensor dbias, float count, Tensor(a!) dx) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_C, CompositeExplicitAutograd, m) {
  m.impl("interface_number", TORCH_BOX(&interface_number));
  m.impl("cuda_architectures", TORCH_BOX(&cuda_architectures));
  m.impl("cuda_driver_lacking", TORCH_BOX(&cuda_driver_lacking));
  m.impl("cpu_capability", TORCH_BOX(&fused_resnet::cpu::cpu_capability));
  m.impl("conv_supported", TORCH_BOX(&fused_resnet::cpu::conv_supported));
  m.impl("empty_channels_last", TORCH_BOX(&fused_resnet::cpu::empty_channels_last));
  m.impl("empty_cache", TORCH_BOX(&fused_resnet::cpu::empty_cache));
}

#if defined(FUSED_RESNET_CUDA)
STABLE_TORCH_LIBRARY_IMPL(fused_resnet_C, CUDA, m) {
  FUSED_RESNET_CUDA_OPERATORS(m);
}
#endif

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_C, CPU, m) {
  m.impl("conv_pack", TORCH_BOX(&fused_resnet::cpu::conv_pack));
  m.impl("conv_scale_act", TORCH_BOX(&fused_resnet::cpu::conv_scale_act));
  m.impl("conv_wgrad", TORCH_BOX(&fused_resnet::cpu::conv_wgrad));
  m.impl("max_pool", TORCH_BOX(&fused_resnet::cpu::max_pool));
  m.impl("max_pool_bwd", TORCH_BOX(&fused_resnet::cpu::max_pool_bwd));
  m.impl("norm_act_max_pool", TORCH_BOX(&fused_resnet::cpu::norm_act_max_pool));
  m.impl("norm_act_max_pool_reduce", TORCH_BOX(&fused_resnet::cpu::norm_act_max_pool_reduce));
  m.impl("norm_act_max_pool_input_grad", TORCH_BOX(&fused_resnet::cpu::norm_act_max_pool_input_grad));
  m.impl("bn_moments", TORCH_BOX(&fused_resnet::cpu::bn_moments));
  m.impl("norm_act", TORCH_BOX(&fused_resnet::cpu::norm_act));
  m.impl("norm_act_reduce", TORCH_BOX(&fused_resnet::cpu::norm_act_reduce));
  m.impl("norm_act_input_grad", TORCH_BOX(&fused_resnet::cpu::norm_act_input_grad));
  m.impl("scale_act", TORCH_BOX(&fused_resnet::cpu::scale_act));
  m.impl("add_act_fwd", TORCH_BOX(&fused_resnet::cpu::add_act_fwd));
  m.impl("add_act_bwd", TORCH_BOX(&fused_resnet::cpu::add_act_bwd));
}
