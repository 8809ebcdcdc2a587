// Contracts of the kernels of attention over additive codes.
//
// Keys are whole numbers: a stage's codewords are int8, and a key is the sum of `gain` times
// codeword over its stages, plus a mean, in int16. A row of int16 is cut into panels of kPanel;
// each holds up to kPanel neighbouring dims of one sub-vector, first the even dims (the real parts
// of pairs), then the odd ones, with zeros behind each half.
#pragma once

#include <cstdint>

namespace commvq {

constexpr int64_t kPanel = 64; // numbers of a panel
constexpr int64_t kHalf = 32;  // of them, real or imaginary parts
constexpr int64_t kTurn = 32;  // tokens that share one turn of the query
constexpr int64_t kQuad = 4;   // query rows are scored in fours
constexpr int64_t kSums = 16;  // partial sums of a vertical reduction, whatever the level
// Where there are many rows of queries, decoded tokens are multiplied with kTile rows at a time,
// which are the lanes: scores of one tile and block stay in L1.
constexpr int64_t kTile = 32;
constexpr int64_t kBlock = 256; // tokens decoded at once
constexpr int64_t kDims = 8;    // dims of decoded values are padded to a multiple of it

inline int64_t rounded_up(int64_t count, int64_t step) {
  return (count + step - 1) / step * step;
}

// Dims [begin, begin + count) of sub-vector `sub`.
struct Panel {
  int64_t sub, begin, count;
};

// One head's keys. Every `group` (1, 2 or 4) neighbouring stages add up within int8 and have one
// gain; the last group of a sub-vector may be smaller. Two groups are a duo.
struct KeyHead {
  int64_t panel_count, width; // of a row: kPanel * panel_count
  const Panel* panels;
  int64_t sub_dim, stages, group, groups, duos;
  const int8_t* words;  // [subs, stages, 256, sub_dim]
  const uint8_t* gains; // [subs, duos, kPanel]: its groups' in turns
  const int16_t* mean;  // [width]
  const uint8_t* turns; // [panel_count]: whether any dim of the panel rotates
};

// Where scores go: row r of token t to [r / tile, t, r % tile] of an array [.., tokens, tile].
struct Scores {
  float* data;
  int64_t tokens, tile;
};

// One head's values, each `factors` [subs, stages] times words [subs, stages, 256, sub_dim] added
// up.
struct ValueHead {
  int64_t subs, stages, sub_dim;
  const int8_t* words;
  const float* factors; // a value is within int16 for any codes
};

// The softmax so far of kTile rows, and what one more block does to it: sums of values so far count
// `keep` times, a weighted value of the block `gain` times. Peaks are logarithms to base 2.
struct Softmax {
  float *peaks, *totals, *keep, *gain;
};

struct AttendKernels {
  // Turns rows of queries [rows, width], in panels, back by an angle for each pair, whose cosines
  // and sines [width / 2] are in the panels' order, and takes a `share` of them.
  void (*turn)(
      const int16_t* query,
      int64_t rows,
      int64_t width,
      const float* cosines,
      const float* sines,
      float share,
      int16_t* turned);

  // Scores `count` <= kTurn tokens, whose codes lie `stride` bytes apart: decodes their keys,
  // rotates them by `steps` (a token's cosines [width / 2], then sines, in units of 2^-15) and
  // multiplies them with `rows` queries, a multiple of kQuad; a score is unit[row] times that.
  // `keys` is room for kTurn rows.
  void (*score)(
      const uint8_t* codes,
      int64_t stride,
      int64_t count,
      const KeyHead& head,
      const int16_t* steps,
      const int16_t* query,
      int64_t rows,
      const float* unit,
      int16_t* keys,
      const Scores& scores);

  // The last step of `score` by itself, for keys [count, width] and kQuad queries: score r of token
  // t goes to scores[t * tile + r].
  void (*multiply)(
      const int16_t* keys,
      int64_t count,
      int64_t width,
      const int16_t* query,
      const float* unit,
      float* scores,
      int64_t tile);

  // Replaces `count` scores by cap * tanh(score / cap); `count` is a multiple of kSums.
  void (*cap)(float* scores, int64_t count, float cap);

  // Raises peaks [rows] to the highest of scores [tokens, rows]. Here and below rows divide kSums,
  // and tokens * rows is a multiple of it.
  void (*raise)(const float* scores, int64_t tokens, int64_t rows, float* peaks);

  // Replaces scores [tokens, rows] by exp(score - peak[row]) and adds them up into totals [rows].
  void (*soften)(float* scores, int64_t tokens, int64_t rows, const float* peak, float* totals);

  // bins[stage, code, r] += weights[t, r] over the tokens, for `stages` neighbouring codes.
  void (*collect)(
      const uint8_t* codes,
      int64_t stride,
      int64_t count,
      int64_t stages,
      const float* weights,
      int64_t rows,
      float* bins);

  // bins[i, r] *= factors[r] for `count` bins.
  void (*lower)(float* bins, int64_t count, int64_t rows, const float* factors);

  // bins[i, r] += factors[r] * other[i, r], the same.
  void (*add)(float* bins, const float* other, int64_t count, int64_t rows, const float* factors);

  // sums[r, d] += scale * (sum over codes of bins[code, r] * words[code, d]) for one stage, rows of
  // sums `width` apart.
  void (*spread)(
      const float* bins,
      const int8_t* words,
      int64_t dims,
      float scale,
      int64_t rows,
      int64_t width,
      float* sums);

  // The rest is for many rows of queries.

  // Decodes `count` <= kTurn keys into rows [count, head.width], rotated by `steps` as in `score`
  // and then all by one `turn` (cosines [width / 2], then sines).
  void (*decode_keys)(
      const uint8_t* codes,
      int64_t stride,
      int64_t count,
      const KeyHead& head,
      const int16_t* steps,
      const int16_t* turn,
      int16_t* keys);

  // Decodes values, rounded to whole numbers, into rows `width` apart.
  void (*decode_values)(
      const uint8_t* codes,
      int64_t stride,
      int64_t count,
      const ValueHead& head,
      int64_t width,
      int16_t* values);

  // Inner products of `count` keys [.., dim] with kTile queries, whose pairs of numbers are
  // [dim / 2, kTile]: scores [.., kTile]. Works on keys up to the next multiple of kDims.
  void (*products)(
      const int16_t* keys, int64_t count, int64_t dim, const int32_t* query, int32_t* scores);

  // Makes weights, as pairs of tokens [count / 2, kTile], of scores [count, kTile], which are worth
  // `units` [kTile] each: whole numbers up to 32500 of which a row adds up to 65000 at most, but
  // for rounding. Leaves `scores` as it likes; an odd token's neighbour weighs 0.
  void (*weigh)(
      int32_t* scores,
      int64_t count,
      const float* units,
      float cap,
      int32_t* weights,
      const Softmax& softmax);

  // sums [width, kTile] = keep * sums + gain * (values times weights), where values are `width`
  // rows of kBlock tokens, the first 2 * `pairs` of which count; width is a multiple of kDims.
  void (*accumulate)(
      const int16_t* values,
      const int32_t* weights,
      int64_t pairs,
      int64_t width,
      const Softmax& softmax,
      float* sums);
};

// The kernels of the level that simd_level() names.
const AttendKernels& attend_kernels();

} // namespace commvq
