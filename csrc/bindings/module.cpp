// The Python module imaml_ext._C. Loading it runs the static initialisers that register the
// operators. It exposes build information, programs and the occupancy of cg_step_, no tensors.
#include <pybind11/pybind11.h>

#include "bindings/program.h"
#include "cpu/row_kernels.h"
#if IMAML_HAS_CUDA
#include "cuda/launch.h"
#endif

PYBIND11_MODULE(_C, m) {
  m.doc() = "Registers torch.ops.imaml and reports how it was built.";
  m.def("build_info", [] {
    pybind11::dict info;
    info["version"] = IMAML_VERSION;
    info["torch_headers"] = IMAML_TORCH_VERSION;
    info["torch_minimum"] = IMAML_TORCH_TARGET;
    info["cuda"] = IMAML_CUDA_VERSION;  // "" in a CPU build
    info["cuda_architectures"] = IMAML_CUDA_ARCHITECTURES;
    info["compiler"] = __VERSION__;
    info["instruction_set"] = imaml::cpu::instruction_set();
    return info;
  });
  imaml::define_program(m);
#if IMAML_HAS_CUDA
  m.def("cg_occupancy", [](std::int64_t rows, std::int64_t dim, bool is_double) {
    namespace cuda = imaml::cuda;
    const cuda::CgOccupancy found =
        is_double ? cuda::cg_occupancy<double>(rows, dim) : cuda::cg_occupancy<float>(rows, dim);
    pybind11::dict concurrent_rows;  // by the number of blocks
    for (int k = 0; k < cuda::kClusterSizes; ++k)
      concurrent_rows[pybind11::int_(1 << k)] = found.concurrent_rows[k];
    return pybind11::make_tuple(found.blocks, concurrent_rows);
  });
#endif
}
