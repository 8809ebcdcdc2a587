// What the additive encoder's kernels work on; the kernels themselves are compiled once a SIMD
// level from additive_encode_kernel.h.
#pragma once

#include <cstdint>

namespace commvq {

// Codewords of a stage are padded to a power of two, at least this: the int16 of the widest level.
constexpr int64_t kLeastWidth = 32;
constexpr int64_t kWideStep = 16; // rows of floats have zeros behind them, up to a multiple of this
constexpr float kLongest = 32767.0f;

// Rows of int16 `stride` apart, an even number of them; row r is in units of units[r], a power of
// two. A row is kLongest units long at most: so a product of two of them fits int32.
struct Rows {
  const int16_t* numbers;
  int64_t stride;
  const float* units;
};

// The codewords of one stage as rows of int16, transposed: dims 2 d and 2 d + 1 of codeword k are
// the low and the high half of pairs[d * width + k], in units of `unit`.
struct Book {
  const int32_t* pairs;
  int64_t width;
  int64_t count; // of pairs: half the dims, rounded up
  float unit;
};

// The codewords of one stage: rounded to int16, which is what is searched, and more roughly to
// bytes, which serve to find candidates.
struct Stage {
  const float* rows;    // [codewords, wide], rounded, zeros behind
  const float* norms;   // [width], their squares; zeros behind
  const int32_t* quads; // [wide / 4, width]: four dims of a codeword, as bytes, offset by 128
  float quad_unit;      // what 1 of a byte is worth
  float quad_error;     // how far the bytes are from a codeword at most
  float longest;        // codeword; NaN if one of them is not finite
  float reach;          // how long a sum of codewords of the stages before can be at most
};

struct Codebooks {
  const Stage* stages;                   // whose rows lie behind each other
  int64_t codewords, width, shift, wide; // width = 1 << shift
};

// For one stage: every 2 c . c' with codewords c of earlier stages, as int16 modulo 2^16 in units
// of `unit`. What is searched for is small enough for them, though sums on the way may not be.
struct Table {
  const int16_t* rows; // [stage, codewords, width]; null if they would not serve
  float unit;
};

// The partial sums of one vector, nearest first.
struct Parents {
  int64_t count;
  const float* score; // |x - sum|^2
  const uint8_t* codes;
  int64_t stride; // of codes, a multiple of 8
};

// The best sums of one more codeword, nearest first.
struct Beam {
  float* score;
  int32_t* origin; // parent * width + codeword
  int64_t capacity;
};

// Room for one vector at a time.
struct Workspace {
  int16_t* scores;  // [beam + 1, width]
  int32_t* list;    // [beam * width]
  float* nearness;  // [beam * width]
  float* residuals; // [beam, wide]
  int32_t* quads;   // [beam, wide / 4]
};

struct EncodeKernels {
  // The sum of squares of `dims` numbers.
  float (*square)(const float* from, int64_t dims);

  // `dims` numbers times `inverse`, rounded; and the same times `unit`, with zeros behind. With
  // null for the former only the latter.
  void (*round_row)(
      const float* from, int64_t dims, float inverse, float unit, int16_t* to, float* wide_to);

  // The largest of `wide` numbers' sizes.
  float (*largest)(const float* row, int64_t wide);

  // `wide` numbers as bytes of `unit`, not offset. Returns the square of how far they are off.
  float (*round_bytes)(const float* row, int64_t wide, float unit, int8_t* to);

  // to[r * width + k] = add[k] + scale * (row r . codeword k), in units of `unit`, as int16 modulo
  // 2^16, off by kTableError at most; add may be null for zeros. What is rounded is less than
  // kMostRounded.
  void (*products)(
      const Rows& rows,
      int64_t count,
      const Book& book,
      float scale,
      const float* add,
      float unit,
      int16_t* to);

  // Extends every parent by every codeword of `stage` and keeps the nearest sums, of equally near
  // ones the first (parent, codeword); returns how many. `base` is what `products` says of x, its
  // norms and -2, and is read if the table has rows.
  int64_t (*extend)(
      const Codebooks& books,
      int64_t stage,
      const float* x,
      const Parents& parents,
      const Table& table,
      const int16_t* base,
      const Workspace& room,
      const Beam& beam);
};

constexpr float kMostRounded = 2097152.0f; // 2^21
constexpr float kTableError = 0.75f;
constexpr float kSpan = 65000.0f; // units from the nearest to the farthest sum, at most
constexpr float kSlack = 250.0f;  // that may be added on either side and still fit 16 bits

// The kernels of the level that simd_level() names.
const EncodeKernels& encode_kernels();

} // namespace commvq
