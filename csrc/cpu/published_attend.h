// Contracts of the kernels of attention over the published preset's codes.
//
// A key is a norm times the sum over rounds of word[a] + i word[b], in rows of int16 laid out in
// panels as additive_attend.h says; a value is a norm times a sum of codebook rows, one for every 1
// among its 0/1 codes. A byte of value codes holds four groups of two bits, each one of four
// patterns.
#pragma once

#include <cstdint>

namespace commvq {

constexpr int64_t kBook = 64;         // codewords of a round
constexpr int64_t kTileRows = 16;     // query rows whose weights are collected together
constexpr int64_t kByteGroups = 4;    // groups in a byte of value codes
constexpr int64_t kByteColumns = 256; // values of a byte

struct PublishedKernels {
  // Keys of `count` <= kTurn tokens, [count, kPanel * panels], rotated by `steps` (a token's
  // cosines [kHalf * panels], then sines, in units of 2^-15) where `turning` [panels] says so.
  // `codes` are a and b of each round, tokens `stride` apart; `words` [rounds, kBook, row].
  void (*decode)(
      const uint8_t* codes,
      int64_t stride,
      int64_t count,
      int64_t rounds,
      const int16_t* words,
      int64_t panels,
      const uint8_t* turning,
      const int16_t* steps,
      int16_t* keys);

  // weights[t, r] *= norms[t] for `count` tokens and kTileRows rows.
  void (*weigh)(float* weights, int64_t count, const float* norms);

  // bins[codes[t], r] += weights[t, r] over `count` tokens, from zeros.
  void (*collect)(const uint8_t* codes, int64_t count, const float* weights, float* bins);

  // Adds up a byte's bins, which it uses up: sums[2 g + k, r] += the bins of all bytes whose group
  // g has a 1 in its place k, for the first `groups` of the byte.
  void (*fold)(float* bins, int64_t groups, float* sums);
};

} // namespace commvq
