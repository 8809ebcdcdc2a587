// What every sum of one more codeword costs, nearly: int16 that tell which of them to look at.
// Included inside a level's namespace by additive_encode_kernel.h; no include guard on purpose.

// What scores mean: a sum's score in units of `unit`, less the nearest parent's, plus `offset`;
// they are off by `error` units at most. A broken one has no scores.
struct Scale {
  float unit, inverse;
  int32_t offset;
  float error;
  bool broken;
};

// A scale that holds every sum from the nearest to the farthest, of parents whose residuals are
// `far` long at most; with a unit of 0, one whose unit is as small as that allows. Broken if it
// does not hold them, or if something is not finite.
COMMVQ_INLINE Scale scale_of(const Parents& parents, float longest, float far, float unit) {
  const float spread = parents.score[parents.count - 1] - parents.score[0];
  const float own = longest * longest + spread, span = own + 4.0f * far * longest;
  const float least = span / kSpan;
  Scale scale = {};
  scale.unit = unit > 0.0f ? unit : (least > 1e-30f ? least : 1e-30f);
  scale.inverse = 1.0f / scale.unit;
  scale.broken = !(least <= scale.unit && least < 1e30f);
  scale.offset = scale.broken ? 0 : -static_cast<int32_t>(0.5f * own * scale.inverse);
  return scale;
}

// A parent's part of the scores.
COMMVQ_INLINE int32_t start_of(const Scale& scale, const Parents& parents, int64_t parent) {
  const float behind = (parents.score[parent] - parents.score[0]) * scale.inverse;
  return scale.offset + static_cast<int32_t>(behind);
}

// to[k] = start + from[k] + the sum over some earlier stages of their rows in the table.
template <int64_t vectors>
COMMVQ_INLINE void some_sums(
    const int16_t* from,
    const Codebooks& books,
    const int16_t* table,
    const uint8_t* codes,
    int64_t first,
    int64_t last,
    int16_t start,
    int64_t k,
    int16_t* to) {
  Halves sums[vectors];
  for (int64_t v = 0; v < vectors; ++v) {
    sums[v] = wrapped_sum(load_halves(from + k + v * kHalves), broadcast_half(start));
  }
  for (int64_t stage = first; stage < last; ++stage) {
    const int64_t row = (stage * books.codewords + codes[stage]) << books.shift;
    for (int64_t v = 0; v < vectors; ++v) {
      sums[v] = wrapped_sum(sums[v], load_halves(table + row + k + v * kHalves));
    }
  }
  for (int64_t v = 0; v < vectors; ++v) {
    store_halves(to + k + v * kHalves, sums[v]);
  }
}

static void add_rows(
    const int16_t* from,
    const Codebooks& books,
    const int16_t* table,
    const uint8_t* codes,
    int64_t first,
    int64_t last,
    int16_t start,
    int16_t* to) {
  int64_t k = 0;
  for (; k + 8 * kHalves <= books.width; k += 8 * kHalves) {
    some_sums<8>(from, books, table, codes, first, last, start, k, to);
  }
  for (; k < books.width; k += kHalves) {
    some_sums<1>(from, books, table, codes, first, last, start, k, to);
  }
}

// How many first codewords all parents share, of `stage`.
COMMVQ_INLINE int64_t shared_codewords(const Parents& parents, int64_t stage) {
  for (int64_t first = 0; first < stage; first += 8) {
    uint64_t own = 0, differ = 0;
    __builtin_memcpy(&own, parents.codes + first, 8);
    for (int64_t parent = 1; parent < parents.count; ++parent) {
      uint64_t other = 0;
      __builtin_memcpy(&other, parents.codes + parent * parents.stride + first, 8);
      differ |= own ^ other;
    }
    if (differ != 0) {
      const int64_t shared = first + __builtin_ctzll(differ) / 8;
      return shared < stage ? shared : stage;
    }
  }
  return stage;
}

// Scores by adding rows of the table. The sum of rows that all parents share is worked out once,
// and kept behind the scores. What only some of them have in common is added anew: a tree of it
// took longer, for its branches can't be predicted.
static void scores_by_table(
    const Codebooks& books,
    int64_t stage,
    const Parents& parents,
    const int16_t* table,
    const int16_t* base,
    const Scale& scale,
    int16_t* scores) {
  const int64_t shared = shared_codewords(parents, stage);
  int16_t* const common = scores + parents.count * books.width;
  add_rows(base, books, table, parents.codes, 0, shared, 0, common);
  for (int64_t parent = 0; parent < parents.count; ++parent) {
    const uint8_t* codes = parents.codes + parent * parents.stride;
    const auto start = static_cast<int16_t>(start_of(scale, parents, parent));
    int16_t* to = scores + parent * books.width;
    add_rows(common, books, table, codes, shared, stage, start, to);
  }
}

// to = x less the parent's codewords, at `vectors` vectors of dims from `d`.
template <int64_t vectors>
COMMVQ_INLINE void some_residual(
    const Codebooks& books,
    int64_t stage,
    const float* x,
    const uint8_t* codes,
    int64_t d,
    float* to) {
  const float* rows = books.stages[0].rows + d; // all stages' lie behind each other
  Lanes rest[vectors];
  for (int64_t v = 0; v < vectors; ++v) {
    rest[v] = load(x + d + v * kLanes);
  }
  for (int64_t earlier = 0; earlier < stage; ++earlier) {
    const float* row = rows + (earlier * books.codewords + codes[earlier]) * books.wide;
    for (int64_t v = 0; v < vectors; ++v) {
      rest[v] = rest[v] - load(row + v * kLanes);
    }
  }
  for (int64_t v = 0; v < vectors; ++v) {
    store(to + d + v * kLanes, rest[v]);
  }
}

static void subtract(
    const Codebooks& books, int64_t stage, const float* x, const uint8_t* codes, float* to) {
  int64_t d = 0;
  for (; d + 4 * kWideStep <= books.wide; d += 4 * kWideStep) {
    some_residual<4 * kVectors>(books, stage, x, codes, d, to);
  }
  for (; d < books.wide; d += kWideStep) {
    some_residual<kVectors>(books, stage, x, codes, d, to);
  }
}

template <int64_t rows, int64_t columns>
COMMVQ_INLINE void some_quads(
    const Codebooks& books,
    const Stage& stage,
    const int32_t* residuals,
    const float* units,
    const int32_t* sums_of,
    const int32_t* starts,
    float inverse,
    int64_t k,
    int16_t* to) {
  const int64_t count = books.wide / 4;
  const int32_t* column = stage.quads + k;
  Ints sums[rows][columns];
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      sums[r][c] = Ints{} - 128 * sums_of[r];
    }
  }
  for (int64_t quad = 0; quad < count; ++quad, column += books.width) {
    for (int64_t r = 0; r < rows; ++r) {
      const Ints own = residuals[r * count + quad] - Ints{};
      for (int64_t c = 0; c < columns; ++c) {
        sums[r][c] = add_quads(sums[r][c], load_ints(column + c * kLanes), own);
      }
    }
  }
  for (int64_t c = 0; c < columns; ++c) {
    const Lanes norm = load(stage.norms + k + c * kLanes) * broadcast(inverse);
    for (int64_t r = 0; r < rows; ++r) {
      const Lanes factor = broadcast(-2.0f * stage.quad_unit * units[r] * inverse);
      const Ints score = rounded(as_floats(sums[r][c]) * factor + norm) + starts[r];
      store_low_halves(to + r * books.width + k + c * kLanes, score);
    }
  }
}

template <int64_t rows>
static void quads(
    const Codebooks& books,
    const Stage& stage,
    const int32_t* residuals,
    const float* units,
    const int32_t* sums_of,
    const int32_t* starts,
    float inverse,
    int16_t* to) {
  int64_t k = 0;
  for (; k + kColumns * kLanes <= books.width; k += kColumns * kLanes) {
    some_quads<rows, kColumns>(books, stage, residuals, units, sums_of, starts, inverse, k, to);
  }
  for (; k < books.width; k += kLanes) {
    some_quads<rows, 1>(books, stage, residuals, units, sums_of, starts, inverse, k, to);
  }
}

COMMVQ_INLINE int32_t sum_of_bytes(const int8_t* bytes, int64_t count) {
  int32_t sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    sum += bytes[i];
  }
  return sum;
}

// The residuals of all parents, and scores by inner products of their bytes with the codewords'.
static Scale scores_by_bytes(
    const Codebooks& books,
    int64_t stage_index,
    const float* x,
    const Parents& parents,
    const Workspace& room) {
  const Stage& stage = books.stages[stage_index];
  const int64_t wide = books.wide, quads_of = wide / 4;
  const float far = __builtin_sqrtf(parents.score[parents.count - 1]);
  // Bytes are up to half their unit off, and so can be longer than what they stand for.
  const float farther = far * (1.0f + __builtin_sqrtf(static_cast<float>(wide)) / 250.0f);
  Scale scale = scale_of(parents, stage.longest + stage.quad_error, farther, 0.0f);
  float off = 0.0f;
  for (int64_t first = 0; first < parents.count && !scale.broken; first += kRows) {
    const int64_t left = parents.count - first, count = left < kRows ? left : kRows;
    float units[kRows];
    int32_t sums_of[kRows], starts[kRows];
    for (int64_t r = 0; r < count; ++r) {
      const int64_t parent = first + r;
      float* residual = room.residuals + parent * wide;
      auto* bytes = reinterpret_cast<int8_t*>(room.quads + parent * quads_of);
      subtract(books, stage_index, x, parents.codes + parent * parents.stride, residual);
      units[r] = largest(residual, wide) * (1.0f / 127.0f);
      const float error = round_bytes(residual, wide, units[r], bytes);
      off = error > off ? error : off;
      sums_of[r] = sum_of_bytes(bytes, wide);
      starts[r] = start_of(scale, parents, parent);
    }
    const int32_t* own = room.quads + first * quads_of;
    int16_t* to = room.scores + first * books.width;
    if (count == kRows) {
      quads<kRows>(books, stage, own, units, sums_of, starts, scale.inverse, to);
    } else {
      for (int64_t r = 0; r < count; ++r) {
        quads<1>(
            books,
            stage,
            own + r * quads_of,
            units + r,
            sums_of + r,
            starts + r,
            scale.inverse,
            to + r * books.width);
      }
    }
  }
  off = __builtin_sqrtf(off);
  const float error = off * (stage.longest + stage.quad_error) + far * stage.quad_error;
  scale.error = 2.0f * error * scale.inverse + 2.0f;
  return scale;
}

// Puts the columns that have no codeword behind all that have one.
static void far_away(const Codebooks& books, int64_t parents, int16_t* scores) {
  for (int64_t parent = 0; parent < parents; ++parent, scores += books.width) {
    for (int64_t k = books.codewords; k < books.width; ++k) {
      scores[k] = 32767;
    }
  }
}
