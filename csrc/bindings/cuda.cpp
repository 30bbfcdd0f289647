// Registers the operators on CUDA. Host code only: the kernels are behind cuda/launch.h.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "bindings/layer_operators.h"
#include "bindings/row_operators.h"
#include "cuda/launch.h"

// Defined in libtorch_cuda. Weak, so that the extension also loads under a CPU build of torch.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(std::int32_t device_index, void** stream);

namespace imaml {
namespace {

// Makes the tensor's device current for its lifetime, and launches on the current stream.
class Cuda {
 public:
  Cuda(const char* op, const Tensor& t) : op_(op), tensor_(t), guard_(t.get_device_index()) {
    if (&aoti_torch_get_current_cuda_stream == nullptr) fail(op, "this build of torch has no CUDA");
    if (aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_) != 0)
      fail(op, "no current CUDA stream");
  }

  template <typename T>
  void cg_step(const CgArgs<T>& a) const {
    Tensor workspace = new_doubles(tensor_, {cuda::cg_workspace(a)});
    check(cuda::cg_step(a, workspace.mutable_data_ptr<double>(), stream_));
  }
  template <typename T, typename Rule>
  void prox_step(const ProxArgs<T>& a, const Rule& rule) const {
    check(cuda::prox_step(a, rule, stream_));
  }
  template <typename T>
  void prox_norms(const ProxArgs<T>& a, double* out) const {
    Tensor workspace = new_doubles(tensor_, {cuda::row_sums_workspace<2>(a.rows, a.dim)});
    check(cuda::prox_norms(a, out, workspace.mutable_data_ptr<double>(), stream_));
  }
  template <typename T>
  void row_dot(const T* a, const T* b, double* out, int64_t rows, int64_t dim) const {
    Tensor workspace = new_doubles(tensor_, {cuda::row_sums_workspace<1>(rows, dim)});
    check(cuda::row_dot(a, b, out, workspace.mutable_data_ptr<double>(), rows, dim, stream_));
  }
  template <typename T>
  void pull_back(const PullBackArgs<T>& a) const {
    check(cuda::pull_back(a, stream_));
  }
  template <typename T>
  void patches(const ConvShape& s, const T* images, T* rows) const {
    check_size(s);
    check(cuda::patches(s, images, rows, stream_));
  }
  template <typename T>
  void patches_transpose(const ConvShape& s, const T* rows, T* images) const {
    check_size(s);
    check(cuda::patches_transpose(s, rows, images, stream_));
  }
  template <typename T>
  void channel_sums(const NormShape& s, const T* g, T* out) const {
    check(cuda::channel_sums(s, g, out, stream_));
  }
  template <typename T>
  void batched_product(const ProductShape& s, const T* a, const T* b, T* y) const {
    constexpr int64_t kMost = int64_t{1} << 26;  // the kernel steps over 32 rows, in 31 bits
    if (s.rows >= kMost || s.columns >= kMost || s.terms >= kMost)
      fail(op_, "matrices must have fewer than 2^26 rows and columns, got ", s.rows, " x ", s.terms,
           " by ", s.terms, " x ", s.columns);
    check(cuda::batched_product(s, a, b, y, stream_));
  }
  template <typename Pass>
  void batch_norm(const Pass& pass) const {
    check(cuda::batch_norm(pass, stream_));
  }

 private:
  void check(int error) const {
    if (error != 0) fail(op_, "CUDA error: ", cuda::error_string(error));
  }
  void check_size(const ConvShape& s) const {
    if (!fits_31_bits(s))
      fail(op_, "a padded image and its patches must each have fewer than 2^31 values");
  }

  const char* op_;
  const Tensor& tensor_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

}  // namespace
}  // namespace imaml

STABLE_TORCH_LIBRARY_IMPL(imaml, CUDA, m) {
  imaml::register_rows<imaml::Cuda>(m);
  imaml::register_layers<imaml::Cuda>(m);
}
