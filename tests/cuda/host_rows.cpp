// Runs the blocks of attention of many rows of queries on the host, for the tests.
#include "cuda/rows_block.h"
#include "cuda/rows_decode.h"
#include "given.h"

using namespace commvq::gpu;

namespace {

template <int kWords, bool kKeys>
void decode(const RowsArguments& m, const AttendSide& side, int64_t units) {
  const size_t bytes = DecodeShared({nullptr}, kWords, 0, 0, side.stages, side.page).carver.used;
  const int64_t splits = ceil_div(m.end - m.begin, m.decode_tokens);
  const int64_t slices = int64_t{side.subs} * side.slices, count = splits * units * slices;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t block = in_order(i, count), slice = block / splits / units;
    Guarded memory(bytes, 0xff);
    DecodeBlock<kWords, kKeys>::run(
        m, block % splits, block / splits % units, static_cast<int>(slice), memory.data());
  }
}

template <bool kKeys>
void decode_words(const RowsArguments& m, int64_t units) {
  const AttendSide& side = kKeys ? m.a.keys : m.a.values;
  switch (slice_width(side.sub_dim) / kSliceStep) {
    case 1:
      return decode<1, kKeys>(m, side, units);
    case 2:
      return decode<2, kKeys>(m, side, units);
    case 3:
      return decode<3, kKeys>(m, side, units);
    default:
      return decode<4, kKeys>(m, side, units);
  }
}

template <int kColumns, int kWarps>
void attend(const RowsArguments& m, int64_t units) {
  const RowsShape shape = {kWarps, m.buffers, kColumns, m.slices};
  const size_t bytes =
      RowsShared({nullptr}, shape, m.key_width, m.a.keys.subs, m.a.values.subs).carver.used;
  const int64_t tiles = ceil_div(m.a.queries, kWarps * kWarpRows) * m.slices;
  const int64_t count = tiles * units * m.a.splits;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t block = in_order(i, count);
    Guarded memory(bytes, 0xff);
    RowsBlock<kColumns, kWarps>::run(
        m, block % tiles, block / tiles % units, block / tiles / units, memory.data());
  }
}

template <int kWarps>
void attend_columns(const RowsArguments& m, int columns, int64_t units) {
  switch (columns) {
    case 4:
      return attend<4, kWarps>(m, units);
    case 8:
      return attend<8, kWarps>(m, units);
    case 12:
      return attend<12, kWarps>(m, units);
    default:
      return attend<16, kWarps>(m, units);
  }
}

} // namespace

// What additive_attend_rows.cu does, with `splits` of a part of `room` tokens; 1 if it does not
// fit.
extern "C" int commvq_attend_rows(const Sizes* sizes, void** pointers, float softcap) {
  Given given(*sizes, pointers, softcap);
  AttendArguments& a = given.arguments;
  const int64_t units = Given::units(*sizes);
  const size_t limit = static_cast<size_t>(sizes->shared_memory);
  const RowsShape shape = rows_shape(a, limit);
  const auto page = [&](const AttendSide& side) {
    const int words = slice_width(side.sub_dim) / kSliceStep;
    return stages_a_page<DecodeShared>(side.stages, words, 0, 0, limit);
  };
  a.keys.page = page(a.keys);
  a.values.page = page(a.values);
  if (shape.warps == 0 || a.keys.page == 0 || a.values.page == 0) {
    return 1;
  }
  a.keys.group = usable_group(a.keys.group, a.keys.stages, a.keys.page);
  RowsArguments m = {};
  m.key_width = decoded_key_width(a.dim);
  m.value_width = shape.width();
  m.slices = shape.slices;
  m.buffers = shape.buffers;
  m.room = std::min(sizes->room, ceil_div(a.stop, kBlockTokens) * kBlockTokens);
  a.split_tokens = ceil_div(ceil_div(m.room, sizes->splits), kBlockTokens) * kBlockTokens;
  a.splits = ceil_div(m.room, a.split_tokens);
  const Left left(a, units, m.slices);
  m.slice_stride = units * a.splits * a.queries;
  const int64_t together = std::min(units, sizes->units_together);
  const int64_t halves = together * m.room / 2;
  Guarded keys(sizeof(Half2) * halves * m.key_width, m.key_width == a.dim ? 0xff : 0);
  Guarded values(sizeof(Half2) * halves * m.value_width, 0xff);
  m.keys = keys.as<Half2>();
  m.values = values.as<Half2>();
  for (a.first_unit = 0; a.first_unit < units; a.first_unit += together) {
    const int64_t now = std::min(together, units - a.first_unit);
    m.a = a;
    for (m.begin = 0; m.begin < a.stop; m.begin = m.end) {
      m.end = std::min(m.begin + m.room, a.stop);
      m.decode_tokens = ceil_div(ceil_div(m.room, 2), kBlockTokens) * kBlockTokens;
      decode_words<true>(m, now);
      decode_words<false>(m, now);
      shape.warps == 8 ? attend_columns<8>(m, shape.columns, now)
                       : attend_columns<4>(m, shape.columns, now);
    }
  }
  merge(a, units, pointers);
  return 0;
}

// {warps, buffers, columns, slices} of a block of rows of queries.
extern "C" void commvq_rows_shape(int64_t queries, int64_t dim, int64_t limit, int* shape) {
  AttendArguments a = {};
  a.queries = queries;
  a.dim = dim;
  a.keys.subs = a.values.subs = 2;
  const RowsShape found = rows_shape(a, static_cast<size_t>(limit));
  const int values[] = {found.warps, found.buffers, found.columns, found.slices};
  std::copy(values, values + 4, shape);
}

// {units together, tokens of a part}.
extern "C" void commvq_part_plan(int64_t units, int64_t stop, int64_t token_bytes, int64_t* plan) {
  const PartPlan found = part_plan(units, stop, token_bytes, 65535);
  plan[0] = found.units;
  plan[1] = found.room;
}

// Where dim d of a token's key or value lies.
extern "C" int64_t commvq_place(int keys, int64_t token, int64_t d, int64_t width) {
  return keys ? key_place(token, d, width) : value_place(token, d, width);
}
