// How attention over codes is cut up for a GPU: what a block works on and what it keeps in shared
// memory. All of it is arithmetic on sizes, for the launcher and for the tests.
#pragma once

#include "cuda/portable.h"

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace commvq::gpu {

constexpr int kTurnBlock = 32;      // tokens that share one turn of the query
constexpr int kTile = 16;           // tokens that a warp works on at once
constexpr int kRows = 8;            // rows of queries that one mma takes
constexpr int kSliceStep = 16;      // dims that one mma takes
constexpr int kMostSlice = 64;      // dims of a slice: 16 bytes of a codeword for each of 4 threads
constexpr int kCodewords = 256;     // a code is a byte
constexpr int kMostStages = 256;    // so that sums of codewords fit in half precision
constexpr int64_t kTableCost = 512; // tokens that take as long as filling the tables

// Warps of a block, one block a processor: as many as leave each thread the registers it needs for
// `tiles` of 8 rows of queries.
COMMVQ_HD constexpr int warps_for(int tiles) {
  return tiles == 1 ? 16 : 12;
}

// One side's codes and codebooks. A sub-vector is cut into slices of at most 64 dims, each padded
// to a multiple of 16; the codewords of `page` stages of a slice are in shared memory at a time.
struct AttendSide {
  const uint8_t* codes;
  int64_t batch_stride, head_stride, token_stride;
  const int8_t* books;  // [heads, subs, stages, 256, sub_dim]
  const float* scales;  // [heads, subs, stages]; null for keys, which have
  const uint8_t* gains; // [heads, subs, stages]
  const int16_t* means; // [heads, dim]
  int subs, stages, sub_dim;
  int slices, page;
  int group; // neighbouring stages whose codewords are added as bytes: 1 or, of keys, 2
};

struct AttendArguments {
  int64_t heads, queries, dim, pairs, stop, turn_rows, turn_blocks; // pairs that turn
  int64_t splits, split_tokens;                                     // a multiple of kTurnBlock
  int64_t first_unit;        // unit = row of the batch * heads + head
  int64_t first_tile, tiles; // of queries, of this launch
  int64_t score_rows;        // of one tile of queries
  const float* query;        // [batch, heads, queries, dim]
  const float* turns;        // [turn_rows, turn_blocks, 2, pairs]: cosines, then sines
  const float* steps;        // [32, 2, pairs]
  const int64_t* first;      // [batch]
  float softcap;
  AttendSide keys, values;
  float* scores; // [units and tiles of this launch, stop, score_rows]
  float* sums;   // [units, splits, queries, dim]
  float* peaks;  // [units, splits, queries]
  float* totals; // the same
};

COMMVQ_HD int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

COMMVQ_HD int slices_of(int sub_dim) {
  return static_cast<int>(ceil_div(sub_dim, kMostSlice));
}

// Dims of a slice, a multiple of 16.
COMMVQ_HD int slice_width(int sub_dim) {
  return static_cast<int>(ceil_div(ceil_div(sub_dim, slices_of(sub_dim)), kSliceStep) * kSliceStep);
}

// Hands out a block's shared memory from its start, in steps of 16 bytes. A Half2 takes `half2`
// bytes: on the host it is larger than on a GPU, whose memory is what plans are made for.
struct Carver {
  char* base;
  size_t half2 = sizeof(Half2);
  size_t used = 0;

  template <class T>
  COMMVQ_HD T* take(int64_t count) {
    T* found = reinterpret_cast<T*>(base + used);
    const size_t size = std::is_same_v<T, Half2> ? half2 : sizeof(T);
    used += (static_cast<size_t>(count) * size + 15) / 16 * 16;
    return found;
  }
};

// Counts what a block takes of a GPU's shared memory.
inline Carver counting() {
  return {nullptr, 4};
}

// Of a sum of a page's codewords: the bytes' offsets in it, negated; what rounding took off that;
// and what 1 of it is worth.
struct PageFacts {
  float start, missed, unit;
};

// A page in shared memory; see Page::load. `words` = dims of a slice / 16.
struct PageMemory {
  uint8_t* table;  // [page, 256, 16 * words]
  Half2* scales;   // of each group
  uint32_t* flips; // [page], and
  uint32_t* adds;  // [page]: how four bytes of a stage are changed, see Page::load
  float* worth;    // [stages]: the scales or gains as they are
  Half2* starts;   // [8 * words]: what sums begin with, a pair of dims each
  PageFacts* facts;

  COMMVQ_HD PageMemory(Carver& carver, int words, int stages, int page)
      : table(carver.take<uint8_t>(static_cast<int64_t>(page) * kCodewords * kSliceStep * words)),
        scales(carver.take<Half2>(page)),
        flips(carver.take<uint32_t>(page)),
        adds(carver.take<uint32_t>(page)),
        worth(carver.take<float>(stages)),
        starts(carver.take<Half2>(8 * words)),
        facts(carver.take<PageFacts>(1)) {}
};

// What a block has in shared memory; `tiles` = rows of queries / 8.
struct ScoreShared {
  Carver carver;
  PageMemory page;
  Half2* steps;  // [32, 8 * words]
  float* query;  // [8 * tiles, 16 * words]
  float* sizes;  // [8 * tiles]: the largest number of each row of `query`
  float* joined; // [warps, 8 * tiles]

  COMMVQ_HD ScoreShared(Carver start, int words, int tiles, int warps, int stages, int page)
      : carver(start),
        page(carver, words, stages, page),
        steps(carver.take<Half2>(kTurnBlock * 8 * words)),
        query(carver.take<float>(kRows * tiles * kSliceStep * words)),
        sizes(carver.take<float>(kRows * tiles)),
        joined(carver.take<float>(warps * kRows * tiles)) {}
};

struct ValueShared {
  Carver carver;
  PageMemory page;
  float* sums;   // [16 * words, 8 * tiles]
  float* peaks;  // [8 * tiles]
  float* totals; // [8 * tiles]
  float* joined; // [warps, 8 * tiles]

  COMMVQ_HD ValueShared(Carver start, int words, int tiles, int warps, int stages, int page)
      : carver(start),
        page(carver, words, stages, page),
        sums(carver.take<float>(kRows * tiles * kSliceStep * words)),
        peaks(carver.take<float>(kRows * tiles)),
        totals(carver.take<float>(kRows * tiles)),
        joined(carver.take<float>(warps * kRows * tiles)) {}
};

// Bytes of shared memory of a layout like ScoreShared.
template <class Layout>
inline size_t shared_bytes(int words, int tiles, int warps, int stages, int page) {
  return Layout(counting(), words, tiles, warps, stages, page).carver.used;
}

// The stages whose codewords are in shared memory at once: as many as fit, in pages of about the
// same size, and a multiple of four where that adds no page, so that codes are read as words.
// 0 when not even one fits.
template <class Layout>
inline int stages_a_page(int stages, int words, int tiles, int warps, size_t limit) {
  int most = 0;
  while (most < stages && shared_bytes<Layout>(words, tiles, warps, stages, most + 1) <= limit) {
    ++most;
  }
  if (most == 0) {
    return 0;
  }
  const int64_t pages = ceil_div(stages, most);
  const int64_t even = ceil_div(stages, pages), fours = ceil_div(even, 4) * 4;
  return static_cast<int>(fours <= most ? (fours < stages ? fours : stages) : even);
}

// The stages of keys that kernels add as bytes, of which `group` may be: pages must not cut them.
inline int usable_group(int64_t group, int stages, int page) {
  return group >= 2 && (page >= stages || page % 2 == 0) ? 2 : 1;
}

// Into how many parts the tokens of a unit are split, when `jobs` = units * tiles of queries share
// `processors` that hold one block at a time: the number whose last wave ends first. Parts are
// multiples of `step` tokens; beginning one takes as long as `beginning` tokens.
inline int64_t choose_splits(
    int64_t jobs,
    int64_t stop,
    int64_t processors,
    int64_t step = kTurnBlock,
    int64_t beginning = kTableCost) {
  const int64_t blocks = ceil_div(stop, step);
  int64_t best = 1, least = -1;
  for (int64_t splits = 1; splits <= blocks && splits <= 4 * processors; ++splits) {
    const int64_t tokens = ceil_div(blocks, splits) * step;
    const int64_t cost = ceil_div(jobs * splits, processors) * (tokens + beginning);
    if (least < 0 || cost < least) {
      best = splits;
      least = cost;
    }
  }
  return best;
}

} // namespace commvq::gpu
