// commvq::pack_codes and commvq::unpack_codes on CUDA: a thread a byte that is written.
#include "cuda/launch.h"
#include "cuda/pack_bits.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

namespace commvq::gpu {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 1 << 16; // beyond, threads take several bytes

__global__ void pack_codes_kernel(
    const uint8_t* codes, int64_t count, int bits, int64_t width, int64_t total, uint8_t* packed) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < total; i += step) {
    packed[i] = packed_byte(codes + i / width * count, count, bits, i % width);
  }
}

__global__ void unpack_codes_kernel(
    const uint8_t* packed, int64_t count, int bits, int64_t width, int64_t total, uint8_t* codes) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < total; i += step) {
    codes[i] = unpacked_code(packed + i / count * width, bits, i % count);
  }
}

unsigned blocks_for(int64_t total) {
  return static_cast<unsigned>(std::min((total + kThreads - 1) / kThreads, kMostBlocks));
}

void check(const char* op, const Tensor& tensor, int64_t bits) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Byte, op, ": the tensor must be uint8");
  STD_TORCH_CHECK(tensor.dim() >= 1, op, ": the tensor must have at least one axis");
  STD_TORCH_CHECK(bits >= 1 && bits <= 8, op, ": bits must be 1 to 8");
}

// A new tensor of the shape of `tensor` but for the last axis.
Tensor with_width(const Tensor& tensor, int64_t width) {
  std::vector<int64_t> sizes(tensor.sizes().begin(), tensor.sizes().end());
  sizes.back() = width;
  return torch::stable::new_empty(tensor, sizes, ScalarType::Byte);
}

Tensor pack_codes(const Tensor& codes, int64_t bits) {
  check("pack_codes", codes, bits);
  const int64_t count = codes.size(codes.dim() - 1), width = packed_width(count, bits);
  const Device device(codes);
  const Tensor packed = with_width(codes, width), from = torch::stable::contiguous(codes);
  const int64_t total = packed.numel();
  if (total > 0) {
    pack_codes_kernel<<<blocks_for(total), kThreads, 0, device.stream()>>>(
        from.const_data_ptr<uint8_t>(),
        count,
        static_cast<int>(bits),
        width,
        total,
        packed.mutable_data_ptr<uint8_t>());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return packed;
}

Tensor unpack_codes(const Tensor& packed, int64_t bits, int64_t count) {
  check("unpack_codes", packed, bits);
  const int64_t width = packed.size(packed.dim() - 1);
  STD_TORCH_CHECK(
      count >= 0 && packed_width(count, bits) <= width,
      "unpack_codes: the rows are too short for so many codes");
  const Device device(packed);
  const Tensor codes = with_width(packed, count), from = torch::stable::contiguous(packed);
  const int64_t total = codes.numel();
  if (total > 0) {
    unpack_codes_kernel<<<blocks_for(total), kThreads, 0, device.stream()>>>(
        from.const_data_ptr<uint8_t>(),
        count,
        static_cast<int>(bits),
        width,
        total,
        codes.mutable_data_ptr<uint8_t>());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return codes;
}

} // namespace
} // namespace commvq::gpu

STABLE_TORCH_LIBRARY_IMPL(commvq, CUDA, m) {
  m.impl("pack_codes", TORCH_BOX(&commvq::gpu::pack_codes));
  m.impl("unpack_codes", TORCH_BOX(&commvq::gpu::unpack_codes));
}
