// Contracts of the kernels of attention over additive codes. All rows of floats are `width` long,
// a multiple of kStep, with zeros behind the head's dims.
#pragma once

#include <cstdint>

namespace commvq {

constexpr int64_t kStep = 16;  // partial sums of a dot product, whatever the level
constexpr int64_t kBlock = 64; // tokens decoded at once; they share one turn of the query

// The codebooks of one head, as they lie in memory.
struct Books {
  int64_t subs, stages, codewords, sub_dim;
  const int8_t* words; // [subs, stages, codewords, sub_dim]
  const float* scales; // [subs, stages]
};

struct AttendKernels {
  // Decodes `count` tokens, whose codes are `stride` bytes apart, into rows of `out`.
  void (*decode)(
      const uint8_t* codes,
      int64_t stride,
      int64_t count,
      const Books& books,
      int64_t width,
      float* out);

  // Rotates the first `rotary` dims of `count` rows in place; `steps` is a row of 2 * rotary
  // floats each: cosines of every dim, then sines, negative on the even ones.
  void (*rotate)(float* rows, int64_t count, int64_t width, int64_t rotary, const float* steps);

  // scores[r * stride + t] = query row r times row t.
  void (*score)(
      const float* rows,
      int64_t count,
      int64_t width,
      const float* query,
      int64_t queries,
      float* scores,
      int64_t stride);

  // Replaces `count` scores by cap * tanh(score / cap).
  void (*cap)(float* scores, int64_t count, float cap);

  // Replaces `count` scores by exp(score - peak), returns their sum.
  float (*soften)(float* scores, int64_t count, float peak);

  // sums[r] += sum over t of weights[r * stride + t] * row t.
  void (*add)(
      const float* rows,
      int64_t count,
      int64_t width,
      const float* weights,
      int64_t stride,
      int64_t queries,
      float* sums);
};

} // namespace commvq
