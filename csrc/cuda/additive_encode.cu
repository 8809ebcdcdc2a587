// commvq::additive_encode on CUDA: greedy and beam search.
#include "cuda/encode_block.h"
#include "cuda/launch.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

namespace commvq::gpu {
namespace {

constexpr int64_t kMostBlocks = 1 << 16;     // beyond, blocks take several jobs
constexpr size_t kSharedToShare = 100 << 10; // so that two blocks fit a processor, where it has 200

// `workspace` is null when a block's memory is shared memory.
__global__ void __launch_bounds__(kEncodeThreads, 2) additive_encode_kernel(
    const __grid_constant__ EncodeArguments a, char* workspace, size_t bytes) {
  extern __shared__ __align__(16) char shared[];
  char* memory = workspace == nullptr ? shared : workspace + blockIdx.x * bytes;
  for (int64_t job = blockIdx.x; job < a.jobs(); job += gridDim.x) {
    EncodeBlock::run(a, job, memory);
  }
}

EncodeArguments checked(const Tensor& x, const Tensor& codebooks, int64_t beam) {
  STD_TORCH_CHECK(
      x.scalar_type() == ScalarType::Float && codebooks.scalar_type() == ScalarType::Float,
      "additive_encode: x and codebooks must be float32");
  STD_TORCH_CHECK(
      x.dim() == 3 && codebooks.dim() == 5,
      "additive_encode: x must be [groups, tokens, subs * sub_dim] and codebooks [groups, subs, "
      "stages, codewords, sub_dim]");
  EncodeArguments a = {};
  a.groups = codebooks.size(0);
  a.subs = codebooks.size(1);
  a.stages = codebooks.size(2);
  a.codewords = codebooks.size(3);
  a.sub_dim = codebooks.size(4);
  a.tokens = x.size(1);
  STD_TORCH_CHECK(
      x.size(0) == a.groups && x.size(2) == a.subs * a.sub_dim,
      "additive_encode: x and codebooks do not fit each other");
  STD_TORCH_CHECK(
      a.codewords >= 1 && a.codewords <= kEncodeThreads && a.subs >= 1 && a.stages >= 1 &&
          a.sub_dim >= 1,
      "additive_encode: codebooks must have no empty axis and at most 256 codewords");
  STD_TORCH_CHECK(beam >= 1, "additive_encode: beam must be at least 1");
  // No more partial sums can be kept than there are.
  a.beam = 1;
  for (int64_t stage = 0; stage < a.stages && a.beam < beam; ++stage) {
    a.beam = std::min(beam, a.beam * a.codewords);
  }
  STD_TORCH_CHECK(a.beam <= 1 << 20, "additive_encode: on a GPU beam must be at most 1048576");
  return a;
}

Tensor additive_encode(const Tensor& x, const Tensor& codebooks, int64_t beam) {
  EncodeArguments a = checked(x, codebooks, beam);
  const Device device(x);
  device.check("additive_encode", {&codebooks});
  const Tensor output =
      torch::stable::new_empty(x, {a.groups, a.tokens, a.subs * a.stages}, ScalarType::Byte);
  if (output.numel() == 0) {
    return output;
  }
  const Tensor rows = x.stride(2) == 1 ? x : torch::stable::contiguous(x);
  a.x = rows.const_data_ptr<float>();
  a.x_group = rows.stride(0);
  a.x_token = rows.stride(1);
  a.books = codebooks.const_data_ptr<float>();
  a.b_group = codebooks.stride(0);
  a.b_sub = codebooks.stride(1);
  a.b_stage = codebooks.stride(2);
  a.b_codeword = codebooks.stride(3);
  a.b_dim = codebooks.stride(4);
  a.codes = output.mutable_data_ptr<uint8_t>();
  a.together =
      tokens_together(a, device.processors(), std::min(kSharedToShare, device.shared_memory()));
  const size_t bytes = EncodeMemory(counting(), a).bytes;
  const bool fits = bytes <= device.shared_memory();
  const int64_t most = fits ? kMostBlocks : device.processors();
  const int64_t blocks = std::min(a.jobs(), most);
  const Tensor workspace = torch::stable::new_empty(
      x, {fits ? 0 : blocks * static_cast<int64_t>(bytes)}, ScalarType::Byte);
  allow_shared_memory(additive_encode_kernel, fits ? bytes : 0);
  additive_encode_kernel<<<
      static_cast<unsigned>(blocks),
      kEncodeThreads,
      fits ? bytes : 0,
      device.stream()>>>(
      a, fits ? nullptr : reinterpret_cast<char*>(workspace.mutable_data_ptr<uint8_t>()), bytes);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return output;
}

} // namespace
} // namespace commvq::gpu

STABLE_TORCH_LIBRARY_IMPL(commvq, CUDA, m) {
  m.impl("additive_encode", TORCH_BOX(&commvq::gpu::additive_encode));
}
