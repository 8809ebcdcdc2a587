// What every operator needs to launch a kernel through torch's stable ABI.
#pragma once

#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>

namespace commvq::gpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The device of a tensor for as long as this lives, its limits and torch's current stream on it.
class Device {
 public:
  explicit Device(const Tensor& on) : index_(on.get_device_index()), guard_(index_) {
    void* found = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &found));
    stream_ = static_cast<cudaStream_t>(found);
  }

  cudaStream_t stream() const { return stream_; }
  int processors() const { return attribute(cudaDevAttrMultiProcessorCount); }
  // Shared memory that a block may have when its kernel asks for it.
  size_t shared_memory() const {
    return static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  }

  // Raises unless all tensors are on this device.
  void check(const char* op, std::initializer_list<const Tensor*> tensors) const {
    for (const Tensor* tensor : tensors) {
      STD_TORCH_CHECK(
          tensor->is_cuda() && tensor->get_device_index() == index_,
          op,
          ": all tensors must be on the same GPU");
    }
  }

 private:
  int attribute(cudaDeviceAttr name) const {
    int value = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, index_));
    return value;
  }

  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// Lets a kernel have `bytes` of shared memory; more than 48 KB must be asked for.
template <class Kernel>
void allow_shared_memory(Kernel kernel, size_t bytes) {
  STD_CUDA_CHECK(cudaFuncSetAttribute(
      reinterpret_cast<const void*>(kernel),
      cudaFuncAttributeMaxDynamicSharedMemorySize,
      static_cast<int>(bytes)));
}

} // namespace commvq::gpu
