// Attention of many rows of queries over codes: its parts, and where decoded tokens lie in between.
//
// Some thousands of tokens are decoded at a time into device memory, small enough to stay in L2,
// in half precision; then every block takes up to 128 rows of queries through them with a running
// softmax. Decoding so costs the same for any number of rows.
#pragma once

#include "cuda/async_copy.h"
#include "cuda/attend_page.h"

namespace commvq::gpu {

constexpr int kBlockTokens = 64;            // that are scored at once
constexpr int kWarpRows = 16;               // rows of queries of a warp
constexpr int kDimStep = 32;                // dims of keys that a thread reads at once
constexpr int kMostColumns = 16;            // of 8 dims of values, in a block
constexpr int kDecodeWarps = 16;            // of a block that decodes
constexpr int64_t kDecodedBytes = 32 << 20; // decoded at a time
constexpr int64_t kDecodedTokens = 8192;    // of as many units as make that
constexpr int64_t kRowsCost = 128;          // tokens that take as long as a block's beginning

struct RowsArguments {
  AttendArguments a;              // its splits and split_tokens are those of a part
  int64_t begin, end, room;       // the part's tokens, and how many it may have: a multiple of 64
  int64_t decode_tokens;          // of a block that decodes; a multiple of 64
  int64_t key_width, value_width; // of decoded tokens
  int slices, buffers;            // of values; of a block's tokens
  int64_t slice_stride;           // of peaks and totals, of which every slice has its own
  Half2* keys;                    // [units of this launch, room * key_width / 2]
  Half2* values;                  // [units of this launch, room * value_width / 2]

  COMMVQ_HD bool first_part() const { return begin == 0; }
  COMMVQ_HD bool last_part() const { return end == a.stop; }
  // Decoded tokens, those beyond the end included.
  COMMVQ_HD int64_t decoded_end() const {
    return begin + ceil_div(end - begin, kBlockTokens) * kBlockTokens;
  }
};

// How a block of rows is made up.
struct RowsShape {
  int warps, buffers, columns, slices; // columns of 8 dims in each of `slices` of the values
  COMMVQ_HD int64_t width() const { return int64_t{8} * columns * slices; }
};

// Where dim d of a key lies among the decoded ones of its unit, in halves: tiles of 8 tokens times
// 32 dims, so that thread 4 * g + t of a warp finds 8 dims of row g in its 16 bytes. Of 32 tokens,
// tile j holds 8t + 2j and 8t + 2j + 1: that is where scores must be for weights to need no
// shuffle.
COMMVQ_HD int64_t key_place(int64_t token, int64_t d, int64_t width) {
  const int64_t tile = token / 32 * 4 + token % 8 / 2, row = token % 32 / 8 * 2 + token % 2;
  return (tile * (width / kDimStep) + d / kDimStep) * (8 * kDimStep) + row * kDimStep +
         d % kDimStep;
}

// The same of a value: tiles of 8 dims times 32 tokens.
COMMVQ_HD int64_t value_place(int64_t token, int64_t d, int64_t width) {
  return (token / 32 * (width / 8) + d / 8) * (8 * 32) + d % 8 * 32 + token % 32;
}

// The token in its 32 of score j % 2 of a pair, thread t, tile j / 2.
COMMVQ_HD int token_of_score(int tile, int t, int j) {
  return 8 * t + 2 * tile + j;
}

// What a block that decodes has in shared memory.
struct DecodeShared {
  Carver carver;
  PageMemory page;
  float* steps; // [32, 2, 8 * words]: cosines, sines

  COMMVQ_HD DecodeShared(
      Carver start, int words, int /*tiles*/, int /*warps*/, int stages, int page)
      : carver(start),
        page(carver, words, stages, page),
        steps(carver.take<float>(kTurnBlock * 2 * 8 * words)) {}
};

// What a block of rows has in shared memory.
struct RowsShared {
  Carver carver;
  Half2* query;  // [rows, key_width / 2], in tiles as keys are
  Half2* keys;   // [buffers, 64 * key_width / 2]
  Half2* values; // [buffers, 64 * columns * 8 / 2]
  float* sizes;  // [rows]: the largest number of each row of `query`
  float* units;  // [key_subs]: what a unit of a decoded key is worth
  float* worths; // [value_subs]: the same of values and their weights

  COMMVQ_HD RowsShared(
      Carver start, const RowsShape& shape, int64_t key_width, int64_t key_subs, int64_t value_subs)
      : carver(start),
        query(carver.take<Half2>(shape.warps * kWarpRows * key_width / 2)),
        keys(carver.take<Half2>(shape.buffers * kBlockTokens * key_width / 2)),
        values(carver.take<Half2>(shape.buffers * kBlockTokens * shape.columns * 4)),
        sizes(carver.take<float>(shape.warps * kWarpRows)),
        units(carver.take<float>(key_subs)),
        worths(carver.take<float>(value_subs)) {}
};

COMMVQ_HD int64_t decoded_key_width(int64_t dim) {
  return ceil_div(dim, kDimStep) * kDimStep;
}

inline size_t shared_bytes(const RowsShape& shape, const AttendArguments& a) {
  return RowsShared(counting(), shape, decoded_key_width(a.dim), a.keys.subs, a.values.subs)
      .carver.used;
}

// The largest block of rows that fits, with two buffers for tokens if it can; no warps if none
// does.
inline RowsShape rows_shape(const AttendArguments& a, size_t limit) {
  RowsShape shape = {};
  shape.slices = static_cast<int>(ceil_div(a.dim, 8 * kMostColumns));
  shape.columns = static_cast<int>(ceil_div(ceil_div(a.dim, shape.slices), 32) * 4);
  for (const int warps : {8, 4}) {
    if (warps == 8 && a.queries <= 4 * kWarpRows) {
      continue;
    }
    for (const int buffers : {2, 1}) {
      shape.warps = warps;
      shape.buffers = buffers;
      if (shared_bytes(shape, a) <= limit) {
        return shape;
      }
    }
  }
  shape.warps = 0;
  return shape;
}

// How much is decoded at a time: the units that share a launch, and the tokens of a part.
struct PartPlan {
  int64_t units, room;
};

inline PartPlan part_plan(int64_t units, int64_t stop, int64_t token_bytes, int64_t most_units) {
  const int64_t tokens = ceil_div(stop, kBlockTokens) * kBlockTokens;
  const int64_t least = tokens < kDecodedTokens ? tokens : kDecodedTokens;
  int64_t together = kDecodedBytes / (least * token_bytes);
  together = together < 1 ? 1 : together < units ? together : units;
  together = together < most_units ? together : most_units;
  int64_t room = kDecodedBytes / (together * token_bytes) / kBlockTokens * kBlockTokens;
  room = room < kBlockTokens ? kBlockTokens : room;
  return {together, room < tokens ? room : tokens};
}

} // namespace commvq::gpu
