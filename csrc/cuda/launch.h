// The launchers of the CUDA kernels, for host code: device pointers and a stream, no CUDA headers.
//
// `stream` is a cudaStream_t. A launcher returns a cudaError_t, 0 for success. launch.cu
// instantiates the templates for float and double.
#pragma once
#include <cstdint>

#include "conv_shape.h"
#include "norm_formulas.h"
#include "product_shape.h"

namespace imaml::cuda {

using std::int64_t;

constexpr int kClusterSizes = 5;  // 1, 2, 4, 8, 16 blocks

struct CgOccupancy {
  int blocks;                          // per row; 0: three launches
  int concurrent_rows[kClusterSizes];  // [k]: rows in flight on the device with 2^k blocks each
};

// The doubles that cg_step needs as `workspace`, on the current device.
template <typename T>
int64_t cg_workspace(const CgArgs<T>&);
template <typename T>
int cg_step(const CgArgs<T>&, double* workspace, void* stream);

// How cg_step runs a batch without a preconditioner on the current device.
template <typename T>
CgOccupancy cg_occupancy(int64_t rows, int64_t dim);

template <typename T, typename Rule>
int prox_step(const ProxArgs<T>&, const Rule&, void* stream);

// The doubles that prox_norms (2 sums per row) and row_dot (1 sum) need as `workspace`.
template <int kSums>
int64_t row_sums_workspace(int64_t rows, int64_t dim);
template <typename T>
int prox_norms(const ProxArgs<T>&, double* out, double* workspace, void* stream);
template <typename T>
int row_dot(const T* a, const T* b, double* out, double* workspace, int64_t rows, int64_t dim,
            void* stream);

template <typename T>
int pull_back(const PullBackArgs<T>&, void* stream);

template <typename T>
int batched_product(const ProductShape&, const T* a, const T* b, T* y, void* stream);

// The shape must pass fits_31_bits.
template <typename T>
int patches(const ConvShape&, const T* images, T* patches, void* stream);
template <typename T>
int patches_transpose(const ConvShape&, const T* patches, T* images, void* stream);
template <typename T>
int channel_sums(const NormShape&, const T* g, T* out, void* stream);

// Pass: a NormForward, NormBackward or NormDoubleBackward.
template <typename Pass>
int batch_norm(const Pass&, void* stream);

const char* error_string(int error);

}  // namespace imaml::cuda
