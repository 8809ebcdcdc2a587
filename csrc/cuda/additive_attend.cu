// commvq::additive_attend on CUDA: scores, weighted sums and the merge of splits, one kernel each.
// Nothing here waits for the GPU or allocates but through torch, so that it can be captured in a
// CUDA graph.
#include "cuda/attend_score.h"
#include "cuda/attend_value.h"
#include "cuda/launch.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

namespace commvq::gpu {
namespace {

constexpr int64_t kMostQueries = 256;
constexpr int64_t kMostScores = int64_t{64} << 20; // floats kept at once, where units allow it
constexpr int64_t kMostBlocks = 65535;             // of a grid's second and third axis
constexpr int kMergeThreads = 128;

template <int kWords, int kTiles>
__global__ void __launch_bounds__(warps_for(kTiles) * kWarp, 1)
    additive_attend_scores(const __grid_constant__ AttendArguments a) {
  extern __shared__ __align__(16) char memory[];
  ScoreBlock<kWords, kTiles, warps_for(kTiles)>::run(a, blockIdx.x, blockIdx.y, blockIdx.z, memory);
}

template <int kWords, int kTiles>
__global__ void __launch_bounds__(warps_for(kTiles) * kWarp, 1)
    additive_attend_values(const __grid_constant__ AttendArguments a) {
  extern __shared__ __align__(16) char memory[];
  ValueBlock<kWords, kTiles, warps_for(kTiles)>::run(a, blockIdx.x, blockIdx.y, blockIdx.z, memory);
}

__global__ void additive_attend_merge(
    const __grid_constant__ AttendArguments a, float* weighted, float* peaks, float* totals) {
  const int64_t unit = blockIdx.x / a.queries, r = blockIdx.x % a.queries;
  for (int64_t d = threadIdx.x; d < a.dim; d += kMergeThreads) {
    merge_splits(a, unit, r, d, weighted, peaks, totals);
  }
}

using Kernel = void (*)(AttendArguments);

template <int kTiles>
Kernel score_kernel(int words) {
  switch (words) {
    case 1:
      return additive_attend_scores<1, kTiles>;
    case 2:
      return additive_attend_scores<2, kTiles>;
    case 3:
      return additive_attend_scores<3, kTiles>;
    default:
      return additive_attend_scores<4, kTiles>;
  }
}

template <int kTiles>
Kernel value_kernel(int words) {
  switch (words) {
    case 1:
      return additive_attend_values<1, kTiles>;
    case 2:
      return additive_attend_values<2, kTiles>;
    case 3:
      return additive_attend_values<3, kTiles>;
    default:
      return additive_attend_values<4, kTiles>;
  }
}

// `tiles` = rows of queries / 8 that a block takes.
template <class Layout>
AttendSide side_of(
    const Tensor& codes,
    const Tensor& books,
    const Tensor& scales,
    int64_t batch,
    int64_t heads,
    int64_t dim,
    int64_t stop,
    int tiles,
    size_t shared_memory) {
  STD_TORCH_CHECK(
      codes.scalar_type() == ScalarType::Byte && codes.dim() == 4 && codes.size(0) == batch &&
          codes.size(1) == heads && codes.size(2) >= stop,
      "additive_attend: codes must be uint8 [batch, heads, at least stop, bytes]");
  STD_TORCH_CHECK(
      books.scalar_type() == ScalarType::Char && books.dim() == 5 && books.size(0) == heads &&
          books.size(3) == kCodewords && books.size(1) * books.size(4) == dim &&
          books.is_contiguous(),
      "additive_attend: books must be contiguous int8 [heads, subs, stages, 256, sub_dim]");
  STD_TORCH_CHECK(
      scales.scalar_type() == ScalarType::Float && scales.is_contiguous() &&
          scales.numel() == heads * books.size(1) * books.size(2),
      "additive_attend: scales must be contiguous float32 [heads, subs, stages]");
  STD_TORCH_CHECK(
      codes.size(3) == books.size(1) * books.size(2) && codes.stride(3) == 1,
      "additive_attend: a token has one byte for each sub-vector and stage");
  STD_TORCH_CHECK(
      books.size(4) % 2 == 0 && books.size(2) >= 1 && books.size(2) <= kMostStages,
      "additive_attend: on a GPU sub-vectors have an even number of dims and 1 to 256 stages");
  const int subs = static_cast<int>(books.size(1)), stages = static_cast<int>(books.size(2));
  const int sub_dim = static_cast<int>(books.size(4));
  const int page = stages_a_page<Layout>(
      stages, slice_width(sub_dim) / kSliceStep, tiles, warps_for(tiles), shared_memory);
  STD_TORCH_CHECK(page > 0, "additive_attend: this GPU has too little shared memory");
  return {
      codes.const_data_ptr<uint8_t>(),
      codes.stride(0),
      codes.stride(1),
      codes.stride(2),
      books.const_data_ptr<int8_t>(),
      scales.const_data_ptr<float>(),
      subs,
      stages,
      sub_dim,
      slices_of(sub_dim),
      page};
}

// Scores and sums of all units, as many at a time as the scores' memory allows.
template <int kTiles>
void launch(AttendArguments a, const Device& device, const Tensor& like, int64_t units) {
  constexpr int kWarps = warps_for(kTiles);
  const int64_t tiles = ceil_div(a.queries, kRows * kTiles);
  a.score_rows = std::min<int64_t>(a.queries, kRows * kTiles);
  const int64_t each = tiles * a.stop * a.score_rows;
  const int64_t most = std::clamp<int64_t>(kMostScores / each, 1, kMostBlocks);
  const int64_t together = std::min(units, most);
  const Tensor scores = torch::stable::new_empty(like, {together * each});
  a.scores = scores.mutable_data_ptr<float>();
  const int key_words = slice_width(a.keys.sub_dim) / kSliceStep;
  const int value_words = slice_width(a.values.sub_dim) / kSliceStep;
  const size_t key_bytes =
      shared_bytes<ScoreShared>(key_words, kTiles, kWarps, a.keys.stages, a.keys.page);
  const size_t value_bytes =
      shared_bytes<ValueShared>(value_words, kTiles, kWarps, a.values.stages, a.values.page);
  const Kernel by_key = score_kernel<kTiles>(key_words);
  const Kernel by_value = value_kernel<kTiles>(value_words);
  allow_shared_memory(by_key, key_bytes);
  allow_shared_memory(by_value, value_bytes);
  for (a.first_unit = 0; a.first_unit < units; a.first_unit += together) {
    const int64_t now = std::min(together, units - a.first_unit);
    const dim3 grid(
        static_cast<unsigned>(a.splits), static_cast<unsigned>(now), static_cast<unsigned>(tiles));
    by_key<<<grid, kWarps * kWarp, key_bytes, device.stream()>>>(a);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    by_value<<<grid, kWarps * kWarp, value_bytes, device.stream()>>>(a);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

std::tuple<Tensor, Tensor, Tensor> additive_attend(
    const Tensor& query,
    const Tensor& key_codes,
    const Tensor& key_books,
    const Tensor& key_scales,
    const Tensor& value_codes,
    const Tensor& value_books,
    const Tensor& value_scales,
    const Tensor& turns,
    const Tensor& steps,
    const Tensor& first,
    int64_t stop,
    double softcap) {
  STD_TORCH_CHECK(
      query.scalar_type() == ScalarType::Float && query.dim() == 4 && query.size(2) >= 1 &&
          query.size(2) <= kMostQueries,
      "additive_attend: query must be float32 [batch, heads, 1 to 256 queries, head_dim]");
  const int64_t batch = query.size(0), heads = query.size(1), queries = query.size(2);
  const int64_t dim = query.size(3), units = batch * heads;
  STD_TORCH_CHECK(
      turns.scalar_type() == ScalarType::Float && turns.dim() == 3 && turns.size(2) <= dim &&
          turns.size(2) % 2 == 0 && (turns.size(0) == 1 || turns.size(0) == batch) && stop >= 0 &&
          turns.size(1) * kTurnBlock >= stop,
      "additive_attend: turns must be float32 [1 or batch, a block of 64 tokens, rotary_dim]");
  const int64_t rotary = turns.size(2);
  STD_TORCH_CHECK(
      steps.scalar_type() == ScalarType::Float && steps.dim() == 2 && steps.size(0) == kTurnBlock &&
          steps.size(1) == 2 * rotary,
      "additive_attend: steps must be float32 [64, 2 * rotary_dim]");
  STD_TORCH_CHECK(
      first.scalar_type() == ScalarType::Long && first.dim() == 1 && first.size(0) == batch,
      "additive_attend: first must be int64 [batch]");
  const Device device(query);
  device.check(
      "additive_attend",
      {&key_codes,
       &key_books,
       &key_scales,
       &value_codes,
       &value_books,
       &value_scales,
       &turns,
       &steps,
       &first});
  const Tensor q = torch::stable::contiguous(query), t = torch::stable::contiguous(turns);
  const Tensor s = torch::stable::contiguous(steps), f = torch::stable::contiguous(first);
  const Tensor weighted = torch::stable::new_empty(query, {batch, heads, queries, dim});
  const Tensor peaks = torch::stable::new_empty(query, {batch, heads, queries});
  const Tensor totals = torch::stable::new_empty(query, {batch, heads, queries});
  if (units == 0) {
    return {weighted, peaks, totals};
  }
  const int tiles = queries <= kRows ? 1 : 2; // of 8 rows, in a block
  const size_t memory = device.shared_memory();
  AttendArguments a = {};
  a.heads = heads;
  a.queries = queries;
  a.dim = dim;
  a.rotary = rotary;
  a.stop = stop;
  a.turn_rows = t.size(0);
  a.turn_blocks = t.size(1);
  a.query = q.const_data_ptr<float>();
  a.turns = t.const_data_ptr<float>();
  a.steps = s.const_data_ptr<float>();
  a.first = f.const_data_ptr<int64_t>();
  a.softcap = static_cast<float>(softcap);
  a.keys = side_of<ScoreShared>(
      key_codes, key_books, key_scales, batch, heads, dim, stop, tiles, memory);
  a.values = side_of<ValueShared>(
      value_codes, value_books, value_scales, batch, heads, dim, stop, tiles, memory);
  if (stop > 0) {
    const int64_t wanted =
        choose_splits(units * ceil_div(queries, kRows * tiles), stop, device.processors());
    a.split_tokens = ceil_div(ceil_div(stop, wanted), kTurnBlock) * kTurnBlock;
    a.splits = ceil_div(stop, a.split_tokens);
  }
  const int64_t parts = std::max<int64_t>(1, units * a.splits * queries);
  const Tensor sums = torch::stable::new_empty(query, {parts * dim});
  const Tensor part_peaks = torch::stable::new_empty(query, {parts});
  const Tensor part_totals = torch::stable::new_empty(query, {parts});
  a.sums = sums.mutable_data_ptr<float>();
  a.peaks = part_peaks.mutable_data_ptr<float>();
  a.totals = part_totals.mutable_data_ptr<float>();
  if (stop > 0) {
    tiles == 1 ? launch<1>(a, device, query, units) : launch<2>(a, device, query, units);
  }
  const dim3 rows(static_cast<unsigned>(units * queries));
  additive_attend_merge<<<rows, kMergeThreads, 0, device.stream()>>>(
      a,
      weighted.mutable_data_ptr<float>(),
      peaks.mutable_data_ptr<float>(),
      totals.mutable_data_ptr<float>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {weighted, peaks, totals};
}

} // namespace
} // namespace commvq::gpu

STABLE_TORCH_LIBRARY_IMPL(commvq, CUDA, m) {
  m.impl("additive_attend", TORCH_BOX(&commvq::gpu::additive_attend));
}
