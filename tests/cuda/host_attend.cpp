// Runs the blocks of attention over codes on the host, one after the other, for the tests.
#include "cuda/attend_score.h"
#include "cuda/attend_value.h"
#include "guarded.h"

#include <algorithm>
#include <cstdint>

using namespace commvq::gpu;

namespace {

struct Sizes {
  int64_t batch, heads, queries, dim, pairs, tokens, stop, turn_rows, turn_blocks;
  int64_t key_subs, key_stages, value_subs, value_stages;
  int64_t splits, shared_memory, units_together, backwards;
};

template <int kWords, int kTiles, int kWarps, template <int, int, int> class Block, class Layout>
void run(const AttendArguments& a, const AttendSide& side, int64_t units, int64_t tiles) {
  const size_t bytes = shared_bytes<Layout>(kWords, kTiles, kWarps, side.stages, side.page);
  const auto in_order = [](int64_t i, int64_t count) { return run_backwards ? count - 1 - i : i; };
  for (int64_t i = 0; i < a.splits * units * tiles; ++i) {
    const int64_t block = in_order(i, a.splits * units * tiles);
    Guarded memory(bytes, 0xff); // NaN, wherever a float is read that nobody wrote
    Block<kWords, kTiles, kWarps>::run(
        a, block % a.splits, block / a.splits % units, block / a.splits / units, memory.data());
  }
}

template <int kTiles, int kWarps, template <int, int, int> class Block, class Layout>
void run_words(const AttendArguments& a, const AttendSide& side, int64_t units, int64_t tiles) {
  switch (slice_width(side.sub_dim) / kSliceStep) {
    case 1:
      return run<1, kTiles, kWarps, Block, Layout>(a, side, units, tiles);
    case 2:
      return run<2, kTiles, kWarps, Block, Layout>(a, side, units, tiles);
    case 3:
      return run<3, kTiles, kWarps, Block, Layout>(a, side, units, tiles);
    default:
      return run<4, kTiles, kWarps, Block, Layout>(a, side, units, tiles);
  }
}

template <int kTiles, int kWarps>
int attend(AttendArguments a, const Sizes& sizes, float* weighted, float* peaks, float* totals) {
  const int64_t units = sizes.batch * sizes.heads, tiles = ceil_div(a.queries, kRows * kTiles);
  const size_t limit = static_cast<size_t>(sizes.shared_memory);
  a.keys.page = stages_a_page<ScoreShared>(
      a.keys.stages, slice_width(a.keys.sub_dim) / kSliceStep, kTiles, kWarps, limit);
  a.values.page = stages_a_page<ValueShared>(
      a.values.stages, slice_width(a.values.sub_dim) / kSliceStep, kTiles, kWarps, limit);
  if (a.keys.page == 0 || a.values.page == 0) {
    return 1;
  }
  a.score_rows = std::min<int64_t>(a.queries, kRows * kTiles);
  const int64_t together = std::min(units, sizes.units_together);
  Guarded scores(sizeof(float) * together * tiles * a.stop * a.score_rows, 0xff);
  const int64_t parts = units * a.splits * a.queries;
  Guarded sums(sizeof(float) * parts * a.dim, 0xff), part_peaks(sizeof(float) * parts, 0xff);
  Guarded part_totals(sizeof(float) * parts, 0xff);
  a.scores = scores.as<float>();
  a.sums = sums.as<float>();
  a.peaks = part_peaks.as<float>();
  a.totals = part_totals.as<float>();
  for (a.first_unit = 0; a.first_unit < units; a.first_unit += together) {
    const int64_t now = std::min(together, units - a.first_unit);
    run_words<kTiles, kWarps, ScoreBlock, ScoreShared>(a, a.keys, now, tiles);
    run_words<kTiles, kWarps, ValueBlock, ValueShared>(a, a.values, now, tiles);
  }
  for (int64_t i = 0; i < units * a.queries * a.dim; ++i) {
    const int64_t at = i / a.dim;
    merge_splits(a, at / a.queries, at % a.queries, i % a.dim, weighted, peaks, totals);
  }
  return 0;
}

} // namespace

// What additive_attend.cu does, on the host. `splits` is as it is given there; `pointers` are the
// operator's tensors in order, then its outputs. With `few_warps` blocks have 4 warps, for speed.
extern "C" int commvq_attend(
    const Sizes* sizes, void** pointers, float softcap, int few_warps, int tiles) {
  const int64_t units = sizes->batch * sizes->heads;
  const auto side = [&](int books, int64_t subs, int64_t stages, const Guarded& codes) {
    const int64_t width = subs * stages;
    AttendSide found = {};
    found.codes = codes.as<uint8_t>();
    found.batch_stride = sizes->heads * sizes->tokens * width;
    found.head_stride = sizes->tokens * width;
    found.token_stride = width;
    found.books = static_cast<const int8_t*>(pointers[books]);
    found.subs = static_cast<int>(subs);
    found.stages = static_cast<int>(stages);
    found.sub_dim = static_cast<int>(sizes->dim / subs);
    found.slices = slices_of(found.sub_dim);
    return found;
  };
  run_backwards = sizes->backwards != 0;
  const int64_t key_width = sizes->key_subs * sizes->key_stages;
  const int64_t value_width = sizes->value_subs * sizes->value_stages;
  const Guarded key_codes(units * sizes->tokens * key_width, pointers[1]);
  const Guarded value_codes(units * sizes->tokens * value_width, pointers[5]);
  const Guarded query(sizeof(float) * units * sizes->queries * sizes->dim, pointers[0]);
  const Guarded turns(
      sizeof(float) * sizes->turn_rows * sizes->turn_blocks * 2 * sizes->pairs, pointers[8]);
  const Guarded steps(sizeof(float) * kTurnBlock * 2 * sizes->pairs, pointers[9]);
  AttendArguments a = {};
  a.heads = sizes->heads;
  a.queries = sizes->queries;
  a.dim = sizes->dim;
  a.pairs = sizes->pairs;
  a.stop = sizes->stop;
  a.turn_rows = sizes->turn_rows;
  a.turn_blocks = sizes->turn_blocks;
  a.query = query.as<float>();
  a.turns = turns.as<float>();
  a.steps = steps.as<float>();
  a.first = static_cast<const int64_t*>(pointers[10]);
  a.softcap = softcap;
  a.keys = side(2, sizes->key_subs, sizes->key_stages, key_codes);
  a.keys.gains = static_cast<const uint8_t*>(pointers[3]);
  a.keys.means = static_cast<const int16_t*>(pointers[4]);
  a.values = side(6, sizes->value_subs, sizes->value_stages, value_codes);
  a.values.scales = static_cast<const float*>(pointers[7]);
  if (a.stop > 0) {
    a.split_tokens = ceil_div(ceil_div(a.stop, sizes->splits), kTurnBlock) * kTurnBlock;
    a.splits = ceil_div(a.stop, a.split_tokens);
  }
  float* weighted = static_cast<float*>(pointers[11]);
  float* peaks = static_cast<float*>(pointers[12]);
  float* totals = static_cast<float*>(pointers[13]);
  if (few_warps) {
    return tiles == 1 ? attend<1, 4>(a, *sizes, weighted, peaks, totals)
                      : attend<2, 4>(a, *sizes, weighted, peaks, totals);
  }
  return tiles == 1 ? attend<1, warps_for(1)>(a, *sizes, weighted, peaks, totals)
                    : attend<2, warps_for(2)>(a, *sizes, weighted, peaks, totals);
}

extern "C" int commvq_stages_a_page(
    int keys, int stages, int words, int tiles, int warps, int64_t limit) {
  const size_t bytes = static_cast<size_t>(limit);
  return keys ? stages_a_page<ScoreShared>(stages, words, tiles, warps, bytes)
              : stages_a_page<ValueShared>(stages, words, tiles, warps, bytes);
}

extern "C" int64_t commvq_choose_splits(int64_t jobs, int64_t stop, int64_t processors) {
  return choose_splits(jobs, stop, processors);
}

extern "C" int commvq_slice_width(int sub_dim) {
  return slice_width(sub_dim);
}

extern "C" float commvq_round_half(float value) {
  return round_half(value);
}
