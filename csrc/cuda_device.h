// What every operator on CUDA does before and after its launch: choose the device and the current
// stream, check the launch. Host code only; the kernels are behind kernels/cuda_launch.h.
#pragma once
#include <torch/csrc/stable/accelerator.h>

#include "checks.h"
#include "kernels/cuda_launch.h"

// Lives in libtorch_cuda, which a CPU build of torch lacks: weak, so that this library loads there.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(std::int32_t device_index, void** stream);

namespace imaml {

// Makes the tensor's device current while it lives.
class Device {
 public:
  Device(const char* op, const Tensor& t) : op_(op), guard_(t.get_device_index()) {
    if (&aoti_torch_get_current_cuda_stream == nullptr) fail(op, "this build of torch has no CUDA");
    if (aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_) != 0)
      fail(op, "no current CUDA stream");
  }

  void* stream() const { return stream_; }

  void check(int error) const {
    if (error != 0) fail(op_, "CUDA error: ", cuda::error_string(error));
  }

 private:
  const char* op_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

}  // namespace imaml
