// commvq::additive_attend on CUDA: scores, weighted sums and the merge of splits, one kernel each;
// of many rows of queries in additive_attend_rows.cu.
// Nothing here waits for the GPU or allocates but through torch, so that it can be captured in a
// CUDA graph.
#include "common/attend_checks.h"
#include "cuda/attend_launch.h"
#include "cuda/attend_score.h"
#include "cuda/attend_value.h"

#include <torch/csrc/stable/library.h>

#include <limits>
#include <tuple>

namespace commvq::gpu {
namespace {

constexpr int64_t kFewQueries = 2 * kRows;         // beyond, decoding again for every 16 costs more
constexpr int64_t kMostScores = int64_t{64} << 20; // floats kept at once, where a tile allows it
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

// A side without its scales, gains, means and page, its stages added one by one.
AttendSide side_of(
    const Tensor& codes,
    const Tensor& books,
    int64_t batch,
    int64_t heads,
    int64_t dim,
    int64_t stop) {
  STD_TORCH_CHECK(
      codes.scalar_type() == ScalarType::Byte && codes.dim() == 4 && codes.size(0) == batch &&
          codes.size(1) == heads && codes.size(2) >= stop,
      "additive_attend: codes must be uint8 [batch, heads, at least stop, subs * stages]");
  STD_TORCH_CHECK(
      books.scalar_type() == ScalarType::Char && books.dim() == 5 && books.size(0) == heads &&
          books.size(3) == kCodewords && books.size(1) * books.size(4) == dim &&
          books.is_contiguous(),
      "additive_attend: books must be contiguous int8 [heads, subs, stages, 256, sub_dim]");
  STD_TORCH_CHECK(
      codes.size(3) == books.size(1) * books.size(2) && codes.stride(3) == 1,
      "additive_attend: a token has one byte for each sub-vector and stage");
  STD_TORCH_CHECK(
      books.size(2) >= 1 && books.size(2) <= kMostStages,
      "additive_attend: on a GPU a sub-vector has 1 to 256 stages");
  AttendSide side = {};
  side.codes = codes.const_data_ptr<uint8_t>();
  side.batch_stride = codes.stride(0);
  side.head_stride = codes.stride(1);
  side.token_stride = codes.stride(2);
  side.books = books.const_data_ptr<int8_t>();
  side.subs = static_cast<int>(books.size(1));
  side.stages = static_cast<int>(books.size(2));
  side.sub_dim = static_cast<int>(books.size(4));
  side.slices = slices_of(side.sub_dim);
  side.group = 1;
  return side;
}

// Whether a tensor is contiguous, of a type, and has one element for each head, sub and stage.
bool fits_stages(const Tensor& tensor, ScalarType type, const Tensor& books) {
  return tensor.scalar_type() == type && tensor.is_contiguous() &&
         tensor.numel() == books.size(0) * books.size(1) * books.size(2);
}

// Scores and sums of all units and tiles of queries, as many at a time as scores may take memory.
template <int kTiles>
Partial attend_few(AttendArguments& a, const Device& device, const Tensor& like, int64_t units) {
  constexpr int kWarps = warps_for(kTiles);
  const size_t limit = device.shared_memory();
  set_pages<ScoreShared, ValueShared>(a, kTiles, kWarps, limit);
  const int64_t tiles = ceil_div(a.queries, kRows * kTiles);
  const int64_t wanted = choose_splits(units * tiles, a.stop, device.processors());
  a.split_tokens = ceil_div(ceil_div(a.stop, wanted), kTurnBlock) * kTurnBlock;
  a.splits = ceil_div(a.stop, a.split_tokens);
  const Partial results(a, like, units);
  a.score_rows = std::min<int64_t>(a.queries, kRows * kTiles);
  const int64_t each = a.stop * a.score_rows;
  const int64_t most = std::clamp<int64_t>(kMostScores / each, 1, kMostGrid);
  const int64_t tiles_at_once = std::min(tiles, most);
  const int64_t units_at_once = std::clamp<int64_t>(most / tiles_at_once, 1, units);
  const Tensor scores = torch::stable::new_empty(like, {units_at_once * tiles_at_once * each});
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
  for (a.first_unit = 0; a.first_unit < units; a.first_unit += units_at_once) {
    const int64_t now = std::min(units_at_once, units - a.first_unit);
    for (a.first_tile = 0; a.first_tile < tiles; a.first_tile += tiles_at_once) {
      a.tiles = std::min(tiles_at_once, tiles - a.first_tile);
      const dim3 grid(
          static_cast<unsigned>(a.splits),
          static_cast<unsigned>(now),
          static_cast<unsigned>(a.tiles));
      by_key<<<grid, kWarps * kWarp, key_bytes, device.stream()>>>(a);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      by_value<<<grid, kWarps * kWarp, value_bytes, device.stream()>>>(a);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
  }
  return results;
}

Partial attend(AttendArguments& a, const Device& device, const Tensor& like, int64_t units) {
  if (a.stop == 0) {
    return Partial(a, like, units); // of no splits
  }
  if (a.queries <= kRows) {
    return attend_few<1>(a, device, like, units);
  }
  const bool many = a.queries > kFewQueries && rows_fit(a, device);
  return many ? attend_rows(a, device, like, units) : attend_few<2>(a, device, like, units);
}

std::tuple<Tensor, Tensor, Tensor> additive_attend(
    const Tensor& query,
    const Tensor& key_codes,
    const Tensor& key_books,
    const Tensor& key_gains,
    const Tensor& key_means,
    int64_t key_group,
    const Tensor& value_codes,
    const Tensor& value_books,
    const Tensor& value_scales,
    const Tensor& turns,
    const Tensor& steps,
    const Tensor& first,
    int64_t stop,
    double softcap) {
  STD_TORCH_CHECK(
      query.scalar_type() == ScalarType::Float && query.dim() == 4 && query.size(3) >= 1,
      "additive_attend: query must be float32 [batch, heads, queries, head_dim]");
  const int64_t batch = query.size(0), heads = query.size(1), queries = query.size(2);
  const int64_t dim = query.size(3), units = batch * heads;
  check_turns("additive_attend", turns, steps, first, batch, dim, stop, kTurnBlock);
  const int64_t pairs = turns.size(3);
  const Device device(query);
  device.check(
      "additive_attend",
      {&key_codes,
       &key_books,
       &key_gains,
       &key_means,
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
  if (units * queries == 0) {
    return {weighted, peaks, totals};
  }
  STD_TORCH_CHECK(
      units * queries <= std::numeric_limits<int>::max() && heads <= kMostGrid,
      "additive_attend: too many rows of queries for one call");
  AttendArguments a = {};
  a.heads = heads;
  a.queries = queries;
  a.dim = dim;
  a.pairs = pairs;
  a.stop = stop;
  a.turn_rows = t.size(0);
  a.turn_blocks = t.size(1);
  a.query = q.const_data_ptr<float>();
  a.turns = t.const_data_ptr<float>();
  a.steps = s.const_data_ptr<float>();
  a.first = f.const_data_ptr<int64_t>();
  a.softcap = static_cast<float>(softcap);
  a.keys = side_of(key_codes, key_books, batch, heads, dim, stop);
  a.values = side_of(value_codes, value_books, batch, heads, dim, stop);
  STD_TORCH_CHECK(
      fits_stages(key_gains, ScalarType::Byte, key_books) && a.keys.sub_dim % 2 == 0,
      "additive_attend: key_gains must be contiguous uint8 [heads, subs, stages], sub_dim even");
  STD_TORCH_CHECK(
      key_means.scalar_type() == ScalarType::Short && key_means.is_contiguous() &&
          key_means.numel() == heads * dim,
      "additive_attend: key_means must be contiguous int16 [heads, dim]");
  STD_TORCH_CHECK(
      fits_stages(value_scales, ScalarType::Float, value_books),
      "additive_attend: value_scales must be contiguous float32 [heads, subs, stages]");
  STD_TORCH_CHECK(
      key_group == 1 || key_group == 2 || key_group == 4,
      "additive_attend: key_group must be 1, 2 or 4");
  a.keys.group = static_cast<int>(key_group);
  a.keys.gains = key_gains.const_data_ptr<uint8_t>();
  a.keys.means = key_means.const_data_ptr<int16_t>();
  a.values.scales = value_scales.const_data_ptr<float>();
  const Partial partial = attend(a, device, query, units);
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
