// The CUDA kernels, as a host compiler sees them: device pointers, a stream, no CUDA headers.
//
// `stream` is a cudaStream_t. Each launcher returns a cudaError_t, 0 for success.
#pragma once
#include <cstdint>

#include "cluster_sizes.h"
#include "norm_formulas.h"
#include "patches.h"

namespace imaml::cuda {

#define IMAML_DECLARE(T)                                                                    \
  std::int64_t cg_step_workspace(const CgArgs<T>&); /* doubles, on the current device */    \
  int cg_step_on(const CgArgs<T>&, double* workspace, void* stream);                        \
  int prox_step_on(const ProxArgs<T>&, const Descent<T>&, void* stream);                    \
  int prox_step_on(const ProxArgs<T>&, const Adam<T>&, void* stream);                       \
  int prox_norms_on(const ProxArgs<T>&, double* out, double* workspace, void* stream);      \
  int row_dot_on(const T* a, const T* b, double* out, double* workspace, std::int64_t rows, \
                 std::int64_t dim, void* stream);                                           \
  int patches_on(const PatchShape&, const T* images, T* rows, void* stream);                \
  int patches_transpose_on(const PatchShape&, const T* rows, T* images, void* stream);      \
  int batch_norm_on(const NormForward<T>&, void* stream);                                   \
  int batch_norm_on(const NormBackward<T>&, void* stream);                                  \
  int batch_norm_on(const NormDoubleBackward<T>&, void* stream);
IMAML_DECLARE(float)
IMAML_DECLARE(double)
#undef IMAML_DECLARE

// How cg_step works on a batch of rows on the current device.
CgOccupancy cg_occupancy_of(std::int64_t rows, std::int64_t dim, bool is_double);
// Whether an image's values can be numbered as the kernels of patches do.
bool fits_patches(const PatchShape&);
std::int64_t sums_workspace(std::int64_t rows, std::int64_t dim, int sums);  // doubles
const char* error_string(int error);

}  // namespace imaml::cuda
