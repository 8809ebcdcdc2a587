// The arguments of ops.additive_attend as tests pass them, in memory that ends where they do.
#pragma once

#include "cuda/attend_value.h"
#include "guarded.h"

#include <algorithm>
#include <cstdint>

struct Sizes {
  int64_t batch, heads, queries, dim, pairs, tokens, stop, turn_rows, turn_blocks;
  int64_t key_subs, key_stages, value_subs, value_stages;
  int64_t splits, shared_memory, units_together, tiles_together, room, key_group, backwards;
};

// `pointers` are the operator's tensors in order, then its outputs.
class Given {
 public:
  Given(const Sizes& sizes, void** pointers, float softcap)
      : key_codes_(codes_bytes(sizes, sizes.key_subs * sizes.key_stages), pointers[1]),
        value_codes_(codes_bytes(sizes, sizes.value_subs * sizes.value_stages), pointers[5]),
        query_(sizeof(float) * units(sizes) * sizes.queries * sizes.dim, pointers[0]),
        turns_(sizeof(float) * sizes.turn_rows * sizes.turn_blocks * 2 * sizes.pairs, pointers[8]),
        steps_(sizeof(float) * commvq::gpu::kTurnBlock * 2 * sizes.pairs, pointers[9]) {
    commvq::gpu::run_backwards = sizes.backwards != 0;
    arguments.heads = sizes.heads;
    arguments.queries = sizes.queries;
    arguments.dim = sizes.dim;
    arguments.pairs = sizes.pairs;
    arguments.stop = sizes.stop;
    arguments.turn_rows = sizes.turn_rows;
    arguments.turn_blocks = sizes.turn_blocks;
    arguments.query = query_.as<float>();
    arguments.turns = turns_.as<float>();
    arguments.steps = steps_.as<float>();
    arguments.first = static_cast<const int64_t*>(pointers[10]);
    arguments.softcap = softcap;
    arguments.keys = side(sizes, pointers[2], sizes.key_subs, sizes.key_stages, key_codes_);
    arguments.keys.group = static_cast<int>(sizes.key_group);
    arguments.keys.gains = static_cast<const uint8_t*>(pointers[3]);
    arguments.keys.means = static_cast<const int16_t*>(pointers[4]);
    arguments.values = side(sizes, pointers[6], sizes.value_subs, sizes.value_stages, value_codes_);
    arguments.values.scales = static_cast<const float*>(pointers[7]);
  }

  commvq::gpu::AttendArguments arguments = {};

  static int64_t units(const Sizes& sizes) { return sizes.batch * sizes.heads; }

 private:
  static size_t codes_bytes(const Sizes& sizes, int64_t width) {
    return units(sizes) * sizes.tokens * width;
  }

  static commvq::gpu::AttendSide side(
      const Sizes& sizes, void* books, int64_t subs, int64_t stages, const Guarded& codes) {
    const int64_t width = subs * stages;
    commvq::gpu::AttendSide found = {};
    found.codes = codes.as<uint8_t>();
    found.batch_stride = sizes.heads * sizes.tokens * width;
    found.head_stride = sizes.tokens * width;
    found.token_stride = width;
    found.books = static_cast<const int8_t*>(books);
    found.subs = static_cast<int>(subs);
    found.stages = static_cast<int>(stages);
    found.sub_dim = static_cast<int>(sizes.dim / subs);
    found.slices = commvq::gpu::slices_of(found.sub_dim);
    found.group = 1;
    return found;
  }

  Guarded key_codes_, value_codes_, query_, turns_, steps_;
};

// Where the splits of all units leave what the merge joins; peaks and totals `copies` times.
struct Left {
  Guarded sums, peaks, totals;

  Left(commvq::gpu::AttendArguments& a, int64_t units, int64_t copies)
      : sums(sizeof(float) * units * a.splits * a.queries * a.dim, 0xff),
        peaks(sizeof(float) * copies * units * a.splits * a.queries, 0xff),
        totals(sizeof(float) * copies * units * a.splits * a.queries, 0xff) {
    a.sums = sums.as<float>();
    a.peaks = peaks.as<float>();
    a.totals = totals.as<float>();
  }
};

// Merges them into the outputs, which follow the operator's eleven tensors.
inline void merge(const commvq::gpu::AttendArguments& a, int64_t units, void** pointers) {
  float* weighted = static_cast<float*>(pointers[11]);
  float* peaks = static_cast<float*>(pointers[12]);
  float* totals = static_cast<float*>(pointers[13]);
  for (int64_t i = 0; i < units * a.queries * a.dim; ++i) {
    const int64_t at = i / a.dim;
    commvq::gpu::merge_splits(
        a, at / a.queries, at % a.queries, i % a.dim, weighted, peaks, totals);
  }
}

inline int64_t in_order(int64_t i, int64_t count) {
  return commvq::gpu::run_backwards ? count - 1 - i : i;
}
