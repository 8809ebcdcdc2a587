// commvq::additive_attend of many rows of queries on CUDA: a part of the tokens is decoded, then
// attended to by all rows, then the next one.
#include "cuda/attend_launch.h"
#include "cuda/rows_block.h"
#include "cuda/rows_decode.h"

namespace commvq::gpu {
namespace {

template <int kWords, bool kKeys>
__global__ void __launch_bounds__(kDecodeWarps* kWarp, 1)
    additive_attend_decode(const __grid_constant__ RowsArguments m) {
  extern __shared__ __align__(16) char memory[];
  const int slice = static_cast<int>(blockIdx.z);
  DecodeBlock<kWords, kKeys>::run(m, blockIdx.x, blockIdx.y, slice, memory);
}

template <int kColumns, int kWarps>
__global__ void __launch_bounds__(kWarps* kWarp, 1)
    additive_attend_rows(const __grid_constant__ RowsArguments m) {
  extern __shared__ __align__(16) char memory[];
  RowsBlock<kColumns, kWarps>::run(m, blockIdx.x, blockIdx.y, blockIdx.z, memory);
}

using Kernel = void (*)(RowsArguments);

template <bool kKeys>
Kernel decode_kernel(int words) {
  switch (words) {
    case 1:
      return additive_attend_decode<1, kKeys>;
    case 2:
      return additive_attend_decode<2, kKeys>;
    case 3:
      return additive_attend_decode<3, kKeys>;
    default:
      return additive_attend_decode<4, kKeys>;
  }
}

template <int kWarps>
Kernel rows_kernel(int columns) {
  switch (columns) {
    case 4:
      return additive_attend_rows<4, kWarps>;
    case 8:
      return additive_attend_rows<8, kWarps>;
    case 12:
      return additive_attend_rows<12, kWarps>;
    default:
      return additive_attend_rows<16, kWarps>;
  }
}

// Decodes one side of a part. A block's codewords should serve many tokens.
template <bool kKeys>
void decode(RowsArguments m, const Device& device, int64_t units) {
  const AttendSide& side = kKeys ? m.a.keys : m.a.values;
  const int64_t slices = int64_t{side.subs} * side.slices;
  const int64_t splits = choose_splits(units * slices, m.end - m.begin, device.processors());
  m.decode_tokens = ceil_div(ceil_div(m.end - m.begin, splits), kBlockTokens) * kBlockTokens;
  const int words = slice_width(side.sub_dim) / kSliceStep;
  const size_t bytes = shared_bytes<DecodeShared>(words, 0, 0, side.stages, side.page);
  const Kernel kernel = decode_kernel<kKeys>(words);
  allow_shared_memory(kernel, bytes);
  const dim3 grid(
      static_cast<unsigned>(ceil_div(m.end - m.begin, m.decode_tokens)),
      static_cast<unsigned>(units),
      static_cast<unsigned>(slices));
  kernel<<<grid, kDecodeWarps * kWarp, bytes, device.stream()>>>(m);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

} // namespace

bool rows_fit(const AttendArguments& a, const Device& device) {
  return rows_shape(a, device.shared_memory()).warps > 0;
}

Partial attend_rows(AttendArguments& a, const Device& device, const Tensor& like, int64_t units) {
  const size_t limit = device.shared_memory();
  const RowsShape shape = rows_shape(a, limit);
  set_pages<DecodeShared, DecodeShared>(a, 0, 0, limit);
  RowsArguments m = {};
  m.key_width = decoded_key_width(a.dim);
  m.value_width = shape.width();
  m.slices = shape.slices;
  m.buffers = shape.buffers;
  const int64_t token_bytes = 2 * (m.key_width + m.value_width);
  const PartPlan plan = part_plan(units, a.stop, token_bytes, kMostGrid);
  m.room = plan.room;
  const int64_t tiles = ceil_div(a.queries, shape.warps * kWarpRows) * shape.slices;
  const int64_t wanted =
      choose_splits(plan.units * tiles, m.room, device.processors(), kBlockTokens, kRowsCost);
  a.split_tokens = ceil_div(ceil_div(m.room, wanted), kBlockTokens) * kBlockTokens;
  a.splits = ceil_div(m.room, a.split_tokens);
  const Partial results(a, like, units, shape.slices);
  m.slice_stride = Partial::count(a, units);
  const int64_t tokens = plan.units * plan.room;
  const Tensor keys = torch::stable::new_empty(like, {tokens * m.key_width}, ScalarType::Half);
  const Tensor values = torch::stable::new_empty(like, {tokens * m.value_width}, ScalarType::Half);
  m.keys = reinterpret_cast<Half2*>(keys.mutable_data_ptr());
  m.values = reinterpret_cast<Half2*>(values.mutable_data_ptr());
  if (m.key_width != a.dim) { // what pads keys must be finite
    const size_t bytes = static_cast<size_t>(tokens * m.key_width) * 2;
    STD_CUDA_CHECK(cudaMemsetAsync(m.keys, 0, bytes, device.stream()));
  }
  const size_t bytes = shared_bytes(shape, a);
  const Kernel kernel =
      shape.warps == 8 ? rows_kernel<8>(shape.columns) : rows_kernel<4>(shape.columns);
  allow_shared_memory(kernel, bytes);
  for (int64_t first = 0; first < units; first += plan.units) {
    const int64_t now = std::min(plan.units, units - first);
    a.first_unit = first;
    m.a = a;
    const dim3 grid(
        static_cast<unsigned>(tiles), static_cast<unsigned>(now), static_cast<unsigned>(a.splits));
    for (m.begin = 0; m.begin < a.stop; m.begin = m.end) {
      m.end = std::min(m.begin + m.room, a.stop);
      decode<true>(m, device, now);
      decode<false>(m, device, now);
      kernel<<<grid, shape.warps * kWarp, bytes, device.stream()>>>(m);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
  }
  return results;
}

} // namespace commvq::gpu
