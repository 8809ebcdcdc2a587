// commvq::pack_codes and commvq::unpack_codes on the CPU: codes of 1 to 8 bits without gaps.
//
// Bits are little-endian within a row, so that eight codes of b bits are exactly b bytes: both
// directions work on such groups through one 64-bit integer.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <vector>

namespace commvq {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kWorthAThread = 1 << 15; // bytes of codes that repay waking one

int64_t packed_width(int64_t count, int64_t bits) {
  return (count * bits + 7) / 8;
}

static_assert(
    std::endian::native == std::endian::little, "groups are written as integers of the machine");

// Up to eight codes into the bytes that they take; `room` bytes are left in the row.
void pack_group(const uint8_t* codes, int64_t count, int64_t bits, uint8_t* packed, int64_t room) {
  const uint64_t mask = (uint64_t{1} << bits) - 1;
  uint64_t stream = 0;
  if (count == 8 && room >= 8) {
    for (int i = 0; i < 8; ++i) {
      stream |= (codes[i] & mask) << (i * bits);
    }
    std::memcpy(packed, &stream, 8); // the next groups overwrite what is beyond this one
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    stream |= (codes[i] & mask) << (i * bits);
  }
  std::memcpy(packed, &stream, static_cast<size_t>(packed_width(count, bits)));
}

void unpack_group(
    const uint8_t* packed, int64_t room, int64_t count, int64_t bits, uint8_t* codes) {
  const uint64_t mask = (uint64_t{1} << bits) - 1;
  uint64_t stream = 0;
  if (count == 8 && room >= 8) {
    std::memcpy(&stream, packed, 8);
    for (int i = 0; i < 8; ++i) {
      codes[i] = static_cast<uint8_t>(stream >> (i * bits) & mask);
    }
    return;
  }
  std::memcpy(&stream, packed, static_cast<size_t>(packed_width(count, bits)));
  for (int64_t i = 0; i < count; ++i) {
    codes[i] = static_cast<uint8_t>(stream >> (i * bits) & mask);
  }
}

// Calls group(row, first code, codes in the group) for every eight codes of every row.
template <class Group>
void for_each_group(int64_t rows, int64_t count, const Group& group) {
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(1, count));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t first = 0; first < count; first += 8) {
        group(row, first, std::min<int64_t>(8, count - first));
      }
    }
  });
}

void check(const char* op, const Tensor& tensor, int64_t bits) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Byte, op, ": the tensor must be uint8");
  STD_TORCH_CHECK(tensor.dim() >= 1, op, ": the tensor must have at least one axis");
  STD_TORCH_CHECK(bits >= 1 && bits <= 8, op, ": bits must be 1 to 8");
}

// A new tensor of the shape of `tensor` but for the last axis.
Tensor with_width(const Tensor& tensor, int64_t width) {
  std::vector<int64_t> sizes(tensor.sizes().begin(), tensor.sizes().end());
  sizes.back() = width;
  return torch::stable::new_empty(tensor, sizes, ScalarType::Byte);
}

Tensor pack_codes(const Tensor& codes, int64_t bits) {
  check("pack_codes", codes, bits);
  const int64_t count = codes.size(codes.dim() - 1);
  const int64_t width = packed_width(count, bits);
  Tensor packed = with_width(codes, width);
  if (packed.numel() == 0) {
    return packed;
  }
  const Tensor from = torch::stable::contiguous(codes);
  const uint8_t* source = from.const_data_ptr<uint8_t>();
  uint8_t* target = packed.mutable_data_ptr<uint8_t>();
  if (bits == 8) {
    std::memcpy(target, source, static_cast<size_t>(packed.numel()));
    return packed;
  }
  for_each_group(packed.numel() / width, count, [&](int64_t row, int64_t first, int64_t size) {
    const int64_t start = first / 8 * bits;
    uint8_t* to = target + row * width + start;
    pack_group(source + row * count + first, size, bits, to, width - start);
  });
  return packed;
}

Tensor unpack_codes(const Tensor& packed, int64_t bits, int64_t count) {
  check("unpack_codes", packed, bits);
  const int64_t width = packed.size(packed.dim() - 1);
  STD_TORCH_CHECK(
      count >= 0 && packed_width(count, bits) <= width,
      "unpack_codes: the rows are too short for so many codes");
  Tensor codes = with_width(packed, count);
  if (codes.numel() == 0) {
    return codes;
  }
  const Tensor from = torch::stable::contiguous(packed);
  const uint8_t* source = from.const_data_ptr<uint8_t>();
  uint8_t* target = codes.mutable_data_ptr<uint8_t>();
  if (bits == 8 && count == width) {
    std::memcpy(target, source, static_cast<size_t>(codes.numel()));
    return codes;
  }
  for_each_group(codes.numel() / count, count, [&](int64_t row, int64_t first, int64_t size) {
    const int64_t start = first / 8 * bits;
    const uint8_t* group = source + row * width + start;
    unpack_group(group, width - start, size, bits, target + row * count + first);
  });
  return codes;
}

} // namespace
} // namespace commvq

STABLE_TORCH_LIBRARY_IMPL(commvq, CPU, m) {
  m.impl("pack_codes", TORCH_BOX(&commvq::pack_codes));
  m.impl("unpack_codes", TORCH_BOX(&commvq::unpack_codes));
}
