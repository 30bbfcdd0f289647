// The importable module imaml_ext._C. Loading it registers the operators (their static
// initialisers run); what Python sees of it is how it was built. It handles no tensors.
#include <pybind11/pybind11.h>

#include "kernels/cpu_kernels.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Registers torch.ops.imaml and says how it was built.";
  m.def("build_info", [] {
    pybind11::dict info;
    info["version"] = IMAML_VERSION;
    info["torch_headers"] = IMAML_TORCH_VERSION;
    info["torch_minimum"] = IMAML_TORCH_TARGET;
    info["cuda"] = IMAML_CUDA_VERSION;  // "" when built for the CPU alone
    info["cuda_architectures"] = IMAML_CUDA_ARCHITECTURES;
    info["compiler"] = __VERSION__;
    info["instruction_set"] = imaml::cpu::instruction_set();
    return info;
  });
}
