// The importable module imaml_ext._C. Loading it registers the operators (their static
// initialisers run); what Python sees of it is how it was built, and how it would use the current
// CUDA device. It handles no tensors.
#include <pybind11/pybind11.h>

#include "kernels/cpu_kernels.h"
#if IMAML_HAS_CUDA
#include "kernels/cuda_launch.h"
#endif

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
#if IMAML_HAS_CUDA
  m.def("cg_occupancy", [](std::int64_t rows, std::int64_t dim, bool is_double) {
    const imaml::cuda::CgOccupancy found = imaml::cuda::cg_occupancy_of(rows, dim, is_double);
    pybind11::dict at_a_time;
    for (int k = 0; k < imaml::cuda::kClusterSizes; ++k)
      at_a_time[pybind11::int_(1 << k)] = found.rows_at_a_time[k];
    return pybind11::make_tuple(found.blocks, at_a_time);
  });
#endif
}
