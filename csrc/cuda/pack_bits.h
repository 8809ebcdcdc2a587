// The bit layout of packed codes, a byte at a time: code i of a row takes bits [i * bits,
// (i + 1) * bits), and bit j is bit j % 8 of byte j / 8.
#pragma once

#include "cuda/portable.h"

namespace commvq::gpu {

COMMVQ_HD int64_t packed_width(int64_t count, int64_t bits) {
  return (count * bits + 7) / 8;
}

// Byte `at` of the packed row of `count` codes.
COMMVQ_HD uint8_t packed_byte(const uint8_t* codes, int64_t count, int bits, int64_t at) {
  const int64_t begin = 8 * at;
  const uint32_t mask = (1u << bits) - 1;
  uint32_t byte = 0;
  for (int64_t i = begin / bits; i < count && i * bits < begin + 8; ++i) {
    const uint32_t code = codes[i] & mask;
    const int64_t shift = i * bits - begin; // below 0: the code begins in the byte before
    byte |= shift < 0 ? code >> -shift : code << shift;
  }
  return static_cast<uint8_t>(byte);
}

// Code `i` of a packed row.
COMMVQ_HD uint8_t unpacked_code(const uint8_t* packed, int bits, int64_t i) {
  const int64_t begin = i * bits, byte = begin / 8;
  const int shift = static_cast<int>(begin % 8);
  uint32_t stream = packed[byte];
  if (shift + bits > 8) {
    stream |= static_cast<uint32_t>(packed[byte + 1]) << 8;
  }
  return static_cast<uint8_t>(stream >> shift & ((1u << bits) - 1));
}

} // namespace commvq::gpu
