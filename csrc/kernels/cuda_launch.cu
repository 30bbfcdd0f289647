// Instantiates the kernels for float and double.
#include "batch_norm.cuh"
#include "cg_step.cuh"
#include "cuda_launch.h"
#include "patches.cuh"
#include "prox_step.cuh"
#include "row_sums.cuh"

namespace imaml::cuda {

#define IMAML_DEFINE(T)                                                                           \
  std::int64_t cg_step_workspace(const CgArgs<T>& a) { return cg_workspace(a); }                  \
  int cg_step_on(const CgArgs<T>& a, double* workspace, void* stream) {                           \
    return cg_step(a, workspace, static_cast<Stream>(stream));                                    \
  }                                                                                               \
  int prox_step_on(const ProxArgs<T>& a, const Descent<T>& rule, void* stream) {                  \
    return prox_step(a, rule, static_cast<Stream>(stream));                                       \
  }                                                                                               \
  int prox_step_on(const ProxArgs<T>& a, const Adam<T>& rule, void* stream) {                     \
    return prox_step(a, rule, static_cast<Stream>(stream));                                       \
  }                                                                                               \
  int prox_norms_on(const ProxArgs<T>& a, double* out, double* workspace, void* stream) {         \
    return row_sums(ProxNorms<T>{a, a.rows, a.dim}, out, workspace, static_cast<Stream>(stream)); \
  }                                                                                               \
  int row_dot_on(const T* a, const T* b, double* out, double* workspace, std::int64_t rows,       \
                 std::int64_t dim, void* stream) {                                                \
    return row_sums(Dot<T>{a, b, rows, dim}, out, workspace, static_cast<Stream>(stream));        \
  }                                                                                               \
  int patches_on(const PatchShape& s, const T* images, T* rows, void* stream) {                   \
    return patches(s, images, rows, static_cast<Stream>(stream));                                 \
  }                                                                                               \
  int patches_transpose_on(const PatchShape& s, const T* rows, T* images, void* stream) {         \
    return patches_transpose(s, rows, images, static_cast<Stream>(stream));                       \
  }                                                                                               \
  int batch_norm_on(const NormForward<T>& pass, void* stream) {                                   \
    return batch_norm(pass, static_cast<Stream>(stream));                                         \
  }                                                                                               \
  int batch_norm_on(const NormBackward<T>& pass, void* stream) {                                  \
    return batch_norm(pass, static_cast<Stream>(stream));                                         \
  }                                                                                               \
  int batch_norm_on(const NormDoubleBackward<T>& pass, void* stream) {                            \
    return batch_norm(pass, static_cast<Stream>(stream));                                         \
  }
IMAML_DEFINE(float)
IMAML_DEFINE(double)
#undef IMAML_DEFINE

CgOccupancy cg_occupancy_of(std::int64_t rows, std::int64_t dim, bool is_double) {
  return is_double ? cg_occupancy<double>(rows, dim) : cg_occupancy<float>(rows, dim);
}
bool fits_patches(const PatchShape& s) { return fits_divisors(s); }
std::int64_t sums_workspace(std::int64_t rows, std::int64_t dim, int sums) {
  return row_sums_workspace(rows, dim, sums);
}
const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace imaml::cuda
