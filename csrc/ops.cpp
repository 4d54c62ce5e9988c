// The one registration file: every compiled kernel, in the private namespace that backends/cpu.py and backends/cuda.py
// call. The public operators, their schemas, fakes and gradients are defined in Python.

#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "cpu/cpu.h"

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  // Importing the module loads the library, which runs the registrations below. It holds nothing itself.
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}

STABLE_TORCH_LIBRARY(fused_resnet_C, m) {
  // The widest vector extension that the running processor and the kernels share, by name.
  m.def("cpu_capability() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_C, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&fused_resnet::cpu::cpu_capability));
}
