// Rounding of vectors and codewords, and inner products of what was rounded. Included inside a
// level's namespace by additive_encode_kernel.h; no include guard on purpose.

constexpr int64_t kLanes = COMMVQ_LANES;
constexpr int64_t kVectors = kWideStep / kLanes;

// Adds up kWideStep numbers, at every level in the same order: the first half and the second, then
// halves of what that gives.
COMMVQ_INLINE float folded(const Lanes* sums) {
#if COMMVQ_X86 && COMMVQ_LANES == 16
  const __m256 eight = _mm256_add_ps(
      _mm512_maskz_extractf32x8_ps(0xff, (__m512)sums[0], 0),
      _mm512_maskz_extractf32x8_ps(0xff, (__m512)sums[0], 1));
#elif COMMVQ_X86 && COMMVQ_LANES == 8
  const __m256 eight = (__m256)(sums[0] + sums[1]);
#endif
#if COMMVQ_X86 && COMMVQ_LANES >= 8
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
#else
  const Lanes four = (sums[0] + sums[2]) + (sums[1] + sums[3]);
#endif
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// `rest` has room for kWideStep numbers.
COMMVQ_INLINE const float* padded(const float* from, int64_t count, float* rest) {
  if (count >= kWideStep) {
    return from;
  }
  __builtin_memset(rest, 0, 4 * kWideStep);
  __builtin_memcpy(rest, from, 4 * count);
  return rest;
}

static float square(const float* from, int64_t dims) {
  Lanes sums[kVectors] = {};
  float rest[kWideStep];
  for (int64_t d = 0; d < dims; d += kWideStep) {
    const float* some = padded(from + d, dims - d, rest);
    for (int64_t v = 0; v < kVectors; ++v) {
      const Lanes value = load(some + v * kLanes);
      sums[v] = sums[v] + value * value;
    }
  }
  return folded(sums);
}

static void round_row(
    const float* from, int64_t dims, float inverse, float unit, int16_t* to, float* wide_to) {
  float rest[kWideStep];
  int16_t whole[kWideStep];
  for (int64_t d = 0; d < dims; d += kWideStep) {
    const float* some = padded(from + d, dims - d, rest);
    for (int64_t v = 0; v < kVectors; ++v) {
      const Ints value = rounded(load(some + v * kLanes) * broadcast(inverse));
      store(wide_to + d + v * kLanes, as_floats(value) * broadcast(unit)); // exact
      store_low_halves(whole + v * kLanes, value);
    }
    if (to != nullptr) {
      __builtin_memcpy(to + d, whole, 2 * (dims - d < kWideStep ? dims - d : kWideStep));
    }
  }
}

static float largest(const float* row, int64_t wide) {
  Lanes most = {};
  for (int64_t d = 0; d < wide; d += kLanes) {
    const Lanes value = load(row + d);
    most = larger(larger(value, -value), most);
  }
  float result = 0.0f;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    result = most[lane] > result ? most[lane] : result;
  }
  return result;
}

static float round_bytes(const float* row, int64_t wide, float unit, int8_t* to) {
  const Lanes inverse = broadcast(unit > 0.0f ? 1.0f / unit : 0.0f);
  Lanes sums[kVectors] = {};
  for (int64_t d = 0; d < wide; d += kWideStep) {
    for (int64_t v = 0; v < kVectors; ++v) {
      const Lanes value = load(row + d + v * kLanes);
      const Ints whole = rounded(value * inverse);
      const Lanes off = value - as_floats(whole) * broadcast(unit);
      sums[v] = sums[v] + off * off;
      store_low_bytes(to + d + v * kLanes, whole);
    }
  }
  return folded(sums);
}

// Four rows and kColumns vectors of codewords at a time: sums in registers hide the latency of an
// addition, and every load of the book serves four rows.
constexpr int64_t kRows = 4;
constexpr int64_t kColumns = COMMVQ_LANES == 16 ? 4 : 2;

template <int64_t rows, int64_t columns>
COMMVQ_INLINE void some_products(
    const Rows& from,
    int64_t row,
    const Book& book,
    int64_t k,
    float scale,
    const float* add,
    float inverse,
    int16_t* to) {
  const int16_t* numbers = from.numbers + row * from.stride;
  const int32_t* column = book.pairs + k;
  Ints sums[rows][columns] = {};
  for (int64_t pair = 0; pair < book.count; ++pair, column += book.width) {
    for (int64_t r = 0; r < rows; ++r) {
      const Ints own = broadcast_pair(numbers + r * from.stride + 2 * pair);
      for (int64_t c = 0; c < columns; ++c) {
        sums[r][c] = add_products(sums[r][c], load_ints(column + c * kLanes), own);
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const Lanes factor = broadcast(scale * book.unit * from.units[row + r] * inverse);
    for (int64_t c = 0; c < columns; ++c) {
      Lanes product = as_floats(sums[r][c]) * factor;
      if (add != nullptr) {
        product = product + load(add + k + c * kLanes) * broadcast(inverse);
      }
      store_low_halves(to + (row + r) * book.width + k + c * kLanes, rounded(product));
    }
  }
}

static void products(
    const Rows& rows,
    int64_t count,
    const Book& book,
    float scale,
    const float* add,
    float unit,
    int16_t* to) {
  const int64_t in_rows = count - count % kRows;
  const float inverse = 1.0f / unit;
  // Codewords outside, so that their columns stay in L1 while all rows pass.
  static_assert(kLeastWidth % kLanes == 0);
  int64_t k = 0;
  for (; k + kColumns * kLanes <= book.width; k += kColumns * kLanes) {
    for (int64_t r = 0; r < in_rows; r += kRows) {
      some_products<kRows, kColumns>(rows, r, book, k, scale, add, inverse, to);
    }
    for (int64_t r = in_rows; r < count; ++r) {
      some_products<1, kColumns>(rows, r, book, k, scale, add, inverse, to);
    }
  }
  for (; k < book.width; k += kLanes) {
    for (int64_t r = 0; r < count; ++r) {
      some_products<1, 1>(rows, r, book, k, scale, add, inverse, to);
    }
  }
}
