// commvq::published_attend on CUDA: one kernel for scores and sums of a split of the tokens, one to
// merge the splits, whose order is fixed. Nothing waits for the GPU or allocates but through torch.
#include "common/attend_checks.h"
#include "cuda/attend_launch.h"
#include "cuda/attend_value.h"
#include "cuda/published_block.h"

#include <torch/csrc/stable/library.h>

#include <limits>
#include <tuple>

namespace commvq::gpu {
namespace {

constexpr int kBlocksTogether = 3;               // on a processor
constexpr int64_t kMostSums = int64_t{64} << 20; // floats that splits may leave, if it can be
constexpr int kMergeThreads = 128;

__global__ void __launch_bounds__(PublishedBlock::kThreads, kBlocksTogether)
    published_attend_split(const __grid_constant__ PublishedArguments m) {
  extern __shared__ __align__(16) char memory[];
  PublishedBlock::run(m, blockIdx.x, memory);
}

__global__ void published_attend_merge(
    const __grid_constant__ AttendArguments a, float* sums, float* peaks, float* totals) {
  const int64_t unit = blockIdx.x / a.queries, r = blockIdx.x % a.queries;
  for (int64_t column = threadIdx.x; column < a.dim; column += kMergeThreads) {
    merge_splits(a, unit, r, column, sums, peaks, totals);
  }
}

PublishedSide side_of(const Tensor& codes, int64_t batch, int64_t bits, int64_t stop) {
  STD_TORCH_CHECK(
      codes.scalar_type() == ScalarType::Byte && codes.dim() == 4 && codes.size(0) == batch &&
          codes.size(1) == 1 && codes.size(2) >= stop &&
          codes.size(3) == kNormBytes + ceil_div(bits, 8) && codes.stride(3) == 1,
      "published_attend: codes must be uint8 [batch, 1, at least stop, bytes of a token]");
  return {codes.const_data_ptr<uint8_t>(), codes.stride(0), codes.stride(2)};
}

// What all splits leave. Several blocks share a processor.
Partial attend(PublishedArguments& m, const Device& device, const Tensor& like, int64_t units) {
  AttendArguments& a = m.a;
  if (a.stop == 0) {
    return Partial(a, like, units); // of no splits
  }
  const int64_t jobs = units * m.tiles;
  int64_t wanted = choose_splits(jobs, a.stop, device.processors() * kBlocksTogether);
  wanted = std::clamp<int64_t>(kMostSums / (units * a.queries * a.dim), 1, wanted);
  a.split_tokens = ceil_div(ceil_div(a.stop, wanted), kTurnBlock) * kTurnBlock;
  a.splits = ceil_div(a.stop, a.split_tokens);
  STD_TORCH_CHECK(
      jobs * a.splits <= std::numeric_limits<int>::max(),
      "published_attend: too many rows of queries for one call");
  const Partial results(a, like, units);
  const dim3 grid(static_cast<unsigned>(jobs * a.splits));
  const size_t bytes = PublishedShared(counting()).carver.used;
  allow_shared_memory(published_attend_split, bytes);
  published_attend_split<<<grid, PublishedBlock::kThreads, bytes, device.stream()>>>(m);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return results;
}

std::tuple<Tensor, Tensor, Tensor> published_attend(
    const Tensor& query,
    const Tensor& key_codes,
    const Tensor& key_words,
    const Tensor& value_codes,
    int64_t groups,
    const Tensor& turns,
    const Tensor& steps,
    const Tensor& first,
    int64_t stop,
    double softcap) {
  STD_TORCH_CHECK(
      query.scalar_type() == ScalarType::Float && query.dim() == 4 && query.size(3) % 2 == 0,
      "published_attend: query must be float32 [batch, heads, queries, an even dim]");
  const int64_t batch = query.size(0), heads = query.size(1), queries = query.size(2);
  const int64_t dim = query.size(3), units = batch * heads;
  check_turns("published_attend", turns, steps, first, batch, dim, stop, kTurnBlock);
  const int64_t pairs = turns.size(3);
  STD_TORCH_CHECK(
      key_words.scalar_type() == ScalarType::Short && key_words.is_contiguous() &&
          key_words.dim() == 6 && key_words.size(0) == heads && key_words.size(1) >= 1 &&
          key_words.size(2) == kRoundWords && key_words.size(3) == ceil_div(dim, 2 * kPanelPairs) &&
          key_words.size(4) == 2 && key_words.size(5) == kPanelPairs,
      "published_attend: key_words must be contiguous int16 [heads, rounds, 64, panels, 2, 32]");
  STD_TORCH_CHECK(groups >= 1, "published_attend: groups must be at least 1");
  const Device device(query);
  device.check("published_attend", {&key_codes, &key_words, &value_codes, &turns, &steps, &first});
  const Tensor q = torch::stable::contiguous(query), t = torch::stable::contiguous(turns);
  const Tensor s = torch::stable::contiguous(steps), f = torch::stable::contiguous(first);
  const Tensor sums = torch::stable::new_empty(query, {batch, heads, queries, 2 * groups});
  const Tensor peaks = torch::stable::new_empty(query, {batch, heads, queries});
  const Tensor totals = torch::stable::new_empty(query, {batch, heads, queries});
  PublishedArguments m = {};
  m.keys = side_of(key_codes, batch, heads * key_words.size(1) * 12, stop);
  m.values = side_of(value_codes, batch, groups * 2, stop);
  if (units * queries == 0) {
    return {sums, peaks, totals};
  }
  STD_TORCH_CHECK(
      units * queries <= std::numeric_limits<int>::max(),
      "published_attend: too many rows of queries for one call");
  m.head_dim = dim;
  m.rounds = key_words.size(1);
  m.panels = key_words.size(3);
  m.groups = groups;
  m.words = key_words.const_data_ptr<int16_t>();
  m.tiles = ceil_div(queries, kRows);
  m.a.heads = heads;
  m.a.queries = queries;
  m.a.dim = 2 * groups;
  m.a.pairs = pairs;
  m.a.stop = stop;
  m.a.turn_rows = t.size(0);
  m.a.turn_blocks = t.size(1);
  m.a.query = q.const_data_ptr<float>();
  m.a.turns = t.const_data_ptr<float>();
  m.a.steps = s.const_data_ptr<float>();
  m.a.first = f.const_data_ptr<int64_t>();
  m.a.softcap = static_cast<float>(softcap);
  const Partial partial = attend(m, device, query, units);
  const dim3 rows(static_cast<unsigned>(units * queries));
  published_attend_merge<<<rows, kMergeThreads, 0, device.stream()>>>(
      m.a,
      sums.mutable_data_ptr<float>(),
      peaks.mutable_data_ptr<float>(),
      totals.mutable_data_ptr<float>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {sums, peaks, totals};
}

} // namespace
} // namespace commvq::gpu

STABLE_TORCH_LIBRARY_IMPL(commvq, CUDA, m) {
  m.impl("published_attend", TORCH_BOX(&commvq::gpu::published_attend));
}
