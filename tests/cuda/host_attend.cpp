// Runs the blocks of attention over codes on the host, one after the other, for the tests.
#include "cuda/attend_score.h"
#include "cuda/attend_value.h"
#include "given.h"

using namespace commvq::gpu;

namespace {

template <int kWords, int kTiles, int kWarps, template <int, int, int> class Block, class Layout>
void run(const AttendArguments& a, const AttendSide& side, int64_t units, int64_t tiles) {
  const size_t bytes =
      Layout({nullptr}, kWords, kTiles, kWarps, side.stages, side.page).carver.used;
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
int attend(AttendArguments a, const Sizes& sizes, void** pointers) {
  const int64_t units = sizes.batch * sizes.heads, tiles = ceil_div(a.queries, kRows * kTiles);
  const size_t limit = static_cast<size_t>(sizes.shared_memory);
  a.keys.page = stages_a_page<ScoreShared>(
      a.keys.stages, slice_width(a.keys.sub_dim) / kSliceStep, kTiles, kWarps, limit);
  a.values.page = stages_a_page<ValueShared>(
      a.values.stages, slice_width(a.values.sub_dim) / kSliceStep, kTiles, kWarps, limit);
  if (a.keys.page == 0 || a.values.page == 0) {
    return 1;
  }
  a.keys.group = usable_group(a.keys.group, a.keys.stages, a.keys.page);
  a.score_rows = std::min<int64_t>(a.queries, kRows * kTiles);
  const int64_t together = std::min(units, sizes.units_together);
  const int64_t at_once = std::min(tiles, sizes.tiles_together);
  Guarded scores(sizeof(float) * together * at_once * a.stop * a.score_rows, 0xff);
  const Left left(a, units, 1);
  a.scores = scores.as<float>();
  for (a.first_unit = 0; a.first_unit < units; a.first_unit += together) {
    const int64_t now = std::min(together, units - a.first_unit);
    for (a.first_tile = 0; a.first_tile < tiles; a.first_tile += at_once) {
      a.tiles = std::min(at_once, tiles - a.first_tile);
      run_words<kTiles, kWarps, ScoreBlock, ScoreShared>(a, a.keys, now, a.tiles);
      run_words<kTiles, kWarps, ValueBlock, ValueShared>(a, a.values, now, a.tiles);
    }
  }
  merge(a, units, pointers);
  return 0;
}

} // namespace

// What additive_attend.cu does for few rows of queries, on the host. `splits` is as it is given
// there; see Given for `pointers`. With `few_warps` blocks have 4 warps, for speed.
extern "C" int commvq_attend(
    const Sizes* sizes, void** pointers, float softcap, int few_warps, int tiles) {
  Given given(*sizes, pointers, softcap);
  AttendArguments& a = given.arguments;
  if (a.stop > 0) {
    a.split_tokens = ceil_div(ceil_div(a.stop, sizes->splits), kTurnBlock) * kTurnBlock;
    a.splits = ceil_div(a.stop, a.split_tokens);
  }
  if (few_warps) {
    return tiles == 1 ? attend<1, 4>(a, *sizes, pointers) : attend<2, 4>(a, *sizes, pointers);
  }
  return tiles == 1 ? attend<1, warps_for(1)>(a, *sizes, pointers)
                    : attend<2, warps_for(2)>(a, *sizes, pointers);
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
