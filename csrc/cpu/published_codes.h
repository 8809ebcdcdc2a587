// How the published preset's codes lie in memory: a token's row begins with an fp16 norm, and codes
// follow without gaps, little-endian, in bits.
#pragma once

#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace commvq {

constexpr int64_t kNormBytes = 2;
constexpr int64_t kKeyBits = 6;   // of a key's code, two a round
constexpr int64_t kGroupBits = 2; // of a value's group

struct PackedRows {
  const uint8_t* data;
  int64_t batch_stride, token_stride, bytes; // of a token, with its norm

  const uint8_t* at(int64_t row, int64_t token) const {
    return data + row * batch_stride + token * token_stride;
  }

  // Norms of the tokens [at, at + count).
  void norms(int64_t row, int64_t first, int64_t count, float* to) const {
    for (int64_t t = 0; t < count; ++t) {
      uint16_t bits;
      std::memcpy(&bits, at(row, first + t), kNormBytes);
      to[t] = static_cast<float>(c10::Half(bits, c10::Half::from_bits()));
    }
  }
};

// Up to eight bytes, as a little-endian number.
inline uint64_t some_bytes(const uint8_t* from, int64_t count) {
  uint64_t found = 0;
  if (count >= 8) {
    std::memcpy(&found, from, 8);
  } else if (count > 0) {
    std::memcpy(&found, from, static_cast<size_t>(count));
  }
  return found;
}

// Unpacks `count` codes of 6 bits, the first of them code `from` of the row, eight at a time: `to`
// has room for the next multiple of eight.
inline void unpack_key(
    const uint8_t* row, int64_t bytes, int64_t from, int64_t count, uint8_t* to) {
  const int64_t bit = from * kKeyBits;
  const uint8_t* at = row + kNormBytes + bit / 8;
  int64_t left = bytes - kNormBytes - bit / 8;
  for (int64_t i = 0; i < count; i += 8, at += kKeyBits, left -= kKeyBits) {
    uint64_t x = some_bytes(at, left) >> bit % 8;
    // Halves, quarters and eighths move apart.
    x = (x & 0xffffff) | (x & 0xffffff000000) << 8;
    x = (x & 0x00000fff00000fff) | (x & 0x00fff00000fff000) << 4;
    x = (x & 0x003f003f003f003f) | (x & 0x0fc00fc00fc00fc0) << 2;
    std::memcpy(to + i, &x, 8);
  }
}

// Transposes up to eight neighbouring bytes of each of `count` rows: byte k of row t goes to
// to[k * width + t]; `width` is a multiple of eight and at least `count`.
inline void transpose_bytes(
    const uint8_t* from, int64_t stride, int64_t bytes, int64_t count, int64_t width, uint8_t* to) {
  for (int64_t first = 0; first < count; first += 8) {
    uint64_t x[8] = {};
    for (int64_t t = 0; t < std::min<int64_t>(8, count - first); ++t) {
      x[t] = some_bytes(from + (first + t) * stride, bytes);
    }
    // Blocks of 4, 2 and 1 bytes change places across the diagonal.
    const uint64_t masks[3] = {0x00000000ffffffff, 0x0000ffff0000ffff, 0x00ff00ff00ff00ff};
    for (int64_t step = 4, level = 0; step > 0; step /= 2, ++level) {
      for (int64_t i = 0; i < 8; ++i) {
        if ((i & step) == 0) {
          const uint64_t swap = (x[i] >> 8 * step ^ x[i + step]) & masks[level];
          x[i] ^= swap << 8 * step;
          x[i + step] ^= swap;
        }
      }
    }
    for (int64_t k = 0; k < 8; ++k) {
      std::memcpy(to + k * width + first, &x[k], 8);
    }
  }
}

} // namespace commvq
