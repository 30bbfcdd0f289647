// Instantiates the launchers for float and double.
#include "cuda/batch_norm.cuh"
#include "cuda/cg_step.cuh"
#include "cuda/channel_sums.cuh"
#include "cuda/launch.h"
#include "cuda/patches.cuh"
#include "cuda/product.cuh"
#include "cuda/prox_step.cuh"
#include "cuda/pull_back.cuh"
#include "cuda/row_sums.cuh"

namespace imaml::cuda {

#define IMAML_INSTANTIATE(T)                                                           \
  template int64_t cg_workspace(const CgArgs<T>&);                                     \
  template int cg_step(const CgArgs<T>&, double*, void*);                              \
  template CgOccupancy cg_occupancy<T>(int64_t, int64_t);                              \
  template int prox_step(const ProxArgs<T>&, const Descent<T>&, void*);                \
  template int prox_step(const ProxArgs<T>&, const Adam<T>&, void*);                   \
  template int prox_norms(const ProxArgs<T>&, double*, double*, void*);                \
  template int row_dot(const T*, const T*, double*, double*, int64_t, int64_t, void*); \
  template int pull_back(const PullBackArgs<T>&, void*);                               \
  template int batched_product(const ProductShape&, const T*, const T*, T*, void*);    \
  template int patches(const ConvShape&, const T*, T*, void*);                         \
  template int patches_transpose(const ConvShape&, const T*, T*, void*);               \
  template int channel_sums(const NormShape&, const T*, T*, void*);                    \
  template int batch_norm(const NormForward<T>&, void*);                               \
  template int batch_norm(const NormBackward<T>&, void*);                              \
  template int batch_norm(const NormDoubleBackward<T>&, void*);
template int64_t row_sums_workspace<1>(int64_t, int64_t);
template int64_t row_sums_workspace<2>(int64_t, int64_t);
IMAML_INSTANTIATE(float)
IMAML_INSTANTIATE(double)
#undef IMAML_INSTANTIATE

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace imaml::cuda
