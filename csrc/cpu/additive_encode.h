// What the additive encoder's kernels work on; the kernels themselves are compiled once a SIMD
// level from additive_encode_kernel.h.
#pragma once

#include <cstdint>

namespace commvq {

// Widths of tables are padded to this many codewords: the lanes of the widest level.
constexpr int64_t kWidthStep = 16;

// The codewords of one stage in whole numbers, transposed: dims 2 d and 2 d + 1 of codeword k are
// the low and the high half of pairs[d * width + k], in units of `unit`, a power of two. A
// codeword's length is kLongest units at most, as a row's is below: so a product of two of them
// fits int32.
struct Book {
  const int32_t* pairs;
  int64_t width; // a multiple of kWidthStep
  int64_t count; // of pairs: half the dims, rounded up
  float unit;
};

constexpr float kLongest = 32767.0f;

// Rows of int16 `stride` apart, an even number of them; row r is in units of units[r].
struct Rows {
  const int16_t* numbers;
  int64_t stride;
  const float* units;
};

// The best partial sums so far, nearest first.
struct Beam {
  float* score;     // |x - sum|^2 - |x|^2
  int64_t* origin;  // parent * width + codeword
  int64_t capacity; // how many to keep
};

// Partial sums as a tree: those that follow each other in `order` share their first codewords, the
// sum order[i] the first shared[i] with the sum order[i - 1] (shared[0] is 0).
struct Tree {
  const int32_t* order;
  const int32_t* shared;
};

struct EncodeKernels {
  // The sum of squares of `dims` numbers.
  float (*square)(const float* from, int64_t dims);

  // One row of `dims` numbers times `inverse`, rounded.
  void (*round_row)(const float* from, int64_t dims, float inverse, int16_t* to);

  // norm[k] = |codeword k|^2
  void (*norms)(const Book& book, float* norm);

  // out[r * width + k] = add[k] + scale * (row r . codeword k); add may be null for zeros.
  void (*products)(
      const Rows& rows, int64_t count, const Book& book, float scale, const float* add, float* out);

  // Extends every parent by every codeword and keeps the best in `beam`; returns how many.
  // The score of parent b with codeword k is base[k] + sum over i of rows[b * terms + i][k] +
  // parent_score[b]. Of equal scores the earlier (parent, codeword) comes first. Parents whose
  // codewords are shared share their rows too. `scores` is room for 2 * parents * width floats.
  int64_t (*extend)(
      const float* base,
      int64_t width,
      const float* const* rows,
      int64_t terms,
      const float* parent_score,
      int64_t parents,
      const Tree& tree,
      float* scores,
      const Beam& beam);
};

// The kernels of the level that simd_level() names.
const EncodeKernels& encode_kernels();

} // namespace commvq
