// Registers the operators on the CPU, whose kernels run on torch's thread pool.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "bindings/layer_operators.h"
#include "bindings/parallel.h"
#include "bindings/row_operators.h"
#include "cpu/batch_norm.h"
#include "cpu/channel_sums.h"
#include "cpu/conv.h"
#include "cpu/patches.h"
#include "cpu/product.h"
#include "cpu/rows.h"

namespace imaml {
namespace {

constexpr auto parallel_for = [](int64_t n, int64_t grain, const auto& body) {
  torch::stable::parallel_for(0, n, grain, body);
};

int threads() { return static_cast<int>(torch::stable::get_num_threads()); }

struct Cpu {
  Cpu(const char*, const Tensor&) {}

  template <typename T>
  void cg_step(const CgArgs<T>& a) const {
    cpu::cg_step(a, threads(), parallel_for);
  }
  template <typename T, typename Rule>
  void prox_step(const ProxArgs<T>& a, const Rule& rule) const {
    cpu::prox_step(a, rule, threads(), parallel_for);
  }
  template <typename T>
  void prox_norms(const ProxArgs<T>& a, double* out) const {
    cpu::prox_norms(a, out, threads(), parallel_for);
  }
  template <typename T>
  void row_dot(const T* a, const T* b, double* out, int64_t rows, int64_t dim) const {
    cpu::row_dot(a, b, out, rows, dim, threads(), parallel_for);
  }
  template <typename T>
  void pull_back(const PullBackArgs<T>& a) const {
    cpu::pull_back(a, parallel_for);
  }
  template <typename T>
  void conv(const ConvShape& s, const T* x, const T* w, const T* bias, T* y) const {
    cpu::conv(s, x, w, bias, y, threads(), parallel_for);
  }
  template <typename T>
  void conv_data_gradient(const ConvShape& s, const T* g, const T* w, T* dx) const {
    cpu::conv_data_gradient(s, g, w, dx, threads(), parallel_for);
  }
  template <typename T>
  void conv_weight_gradient(const ConvShape& s, const T* x, const T* g, T* dw) const {
    cpu::conv_weight_gradient(s, x, g, dw, threads(), parallel_for);
  }
  template <typename T>
  void patches(const ConvShape& s, const T* images, T* rows) const {
    cpu::patches(s, images, rows, parallel_for);
  }
  template <typename T>
  void patches_transpose(const ConvShape& s, const T* rows, T* images) const {
    cpu::patches_transpose(s, rows, images, parallel_for);
  }
  template <typename T>
  void channel_sums(const NormShape& s, const T* g, T* out) const {
    cpu::channel_sums(s, g, out, parallel_for);
  }
  template <typename T>
  void batched_product(const ProductShape& s, const T* a, const T* b, T* y) const {
    cpu::batched_product(s, a, b, y, parallel_for);
  }
  template <typename Pass>
  void batch_norm(const Pass& pass) const {
    cpu::batch_norm(pass, threads(), parallel_for);
  }
};

}  // namespace

void run_in_parallel(int64_t n, int64_t grain, ParallelBody body, const void* context) {
  torch::stable::parallel_for(0, n, grain,
                              [=](int64_t first, int64_t last) { body(context, first, last); });
}

}  // namespace imaml

STABLE_TORCH_LIBRARY_IMPL(imaml, CPU, m) {
  imaml::register_rows<imaml::Cpu>(m);
  imaml::register_direct_convolutions<imaml::Cpu>(m);
  imaml::register_layers<imaml::Cpu>(m);
}
