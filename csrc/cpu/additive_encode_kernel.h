// The arithmetic of the additive encoder at one SIMD level; see additive_encode.h for the
// contracts. Lanes are codewords. Products are whole numbers, and their sums run in one fixed order
// (over earlier stages), so all levels, block sizes and thread counts give the same bits.

#include "cpu/ints.h"

constexpr int64_t kLanes = COMMVQ_LANES;

constexpr int64_t kMinima = 16; // kWidthStep: every row of scores has as many columns
constexpr int64_t kVectors = kMinima / kLanes;

// In kMinima partial sums, so that every level adds in the same order.
static float square(const float* from, int64_t dims) {
  Lanes sums[kVectors] = {};
  for (int64_t d = 0; d < dims; d += kMinima) {
    float rest[kMinima] = {};
    const float* some = from + d;
    if (d + kMinima > dims) {
      __builtin_memcpy(rest, some, 4 * (dims - d));
      some = rest;
    }
    for (int64_t v = 0; v < kVectors; ++v) {
      const Lanes value = load(some + v * kLanes);
      sums[v] = sums[v] + value * value;
    }
  }
  float parts[kMinima], sum = 0.0f;
  for (int64_t v = 0; v < kVectors; ++v) {
    store(parts + v * kLanes, sums[v]);
  }
  for (int64_t i = 0; i < kMinima; ++i) {
    sum += parts[i];
  }
  return sum;
}

static void round_row(const float* from, int64_t dims, float inverse, int16_t* to) {
  const Lanes factor = broadcast(inverse);
  int64_t d = 0;
  for (; d + kLanes <= dims; d += kLanes) {
    store_rounded(to + d, load(from + d) * factor);
  }
  if (d < dims) {
    float rest[kLanes] = {};
    int16_t whole[kLanes];
    __builtin_memcpy(rest, from + d, 4 * (dims - d));
    store_rounded(whole, load(rest) * factor);
    __builtin_memcpy(to + d, whole, 2 * (dims - d));
  }
}

static void norms(const Book& book, float* norm) {
  const Lanes scale = broadcast(book.unit * book.unit);
  for (int64_t k = 0; k < book.width; k += kLanes) {
    Ints sum = Ints{};
    for (int64_t pair = 0; pair < book.count; ++pair) {
      const Ints both = load_ints(book.pairs + pair * book.width + k);
      sum = add_products(sum, both, both);
    }
    store(norm + k, as_floats(sum) * scale);
  }
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
    float* out) {
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
    const Lanes unit = broadcast(scale * book.unit * from.units[row + r]); // exact
    for (int64_t c = 0; c < columns; ++c) {
      const Lanes product = as_floats(sums[r][c]) * unit;
      float* to = out + (row + r) * book.width + k + c * kLanes;
      store(to, add == nullptr ? product : load(add + k + c * kLanes) + product);
    }
  }
}

static void products(
    const Rows& rows, int64_t count, const Book& book, float scale, const float* add, float* out) {
  const int64_t in_rows = count - count % kRows;
  const int64_t in_columns = book.width - book.width % (kColumns * kLanes);
  // Codewords outside, so that their columns stay in L1 while all rows pass.
  for (int64_t k = 0; k < in_columns; k += kColumns * kLanes) {
    for (int64_t r = 0; r < in_rows; r += kRows) {
      some_products<kRows, kColumns>(rows, r, book, k, scale, add, out);
    }
    for (int64_t r = in_rows; r < count; ++r) {
      some_products<1, kColumns>(rows, r, book, k, scale, add, out);
    }
  }
  for (int64_t k = in_columns; k < book.width; k += kLanes) {
    for (int64_t r = 0; r < count; ++r) {
      some_products<1, 1>(rows, r, book, k, scale, add, out);
    }
  }
}

// to[k] = from[k] + the sum over rows of row[k], and at the end + start, lowering `least`, the
// least of every sixteenth column.
template <bool at_end>
COMMVQ_INLINE void add_rows(
    const float* from,
    int64_t width,
    const float* const* rows,
    int64_t count,
    float* to,
    float start = 0.0f,
    Lanes* least = nullptr) {
  for (int64_t k = 0; k < width; k += kMinima) {
    Lanes sum[kVectors];
    for (int64_t v = 0; v < kVectors; ++v) {
      sum[v] = load(from + k + v * kLanes);
    }
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t v = 0; v < kVectors; ++v) {
        sum[v] = sum[v] + load(rows[i] + k + v * kLanes);
      }
    }
    for (int64_t v = 0; v < kVectors; ++v) {
      if constexpr (at_end) {
        sum[v] = sum[v] + broadcast(start);
        least[v] = smaller(sum[v], least[v]);
      }
      store(to + k + v * kLanes, sum[v]);
    }
  }
}

// Fills `scores` [parents, width] and `minima`: the least score of every sixteenth column. The sum
// of rows that parents share is worked out once and kept behind the scores, as deep down the tree
// as the parents to come need it; it is the same sum, in the same order.
static void score_all(
    const float* base,
    int64_t width,
    const float* const* rows,
    int64_t terms,
    const float* parent_score,
    int64_t parents,
    const Tree& tree,
    float* scores,
    float* minima) {
  Lanes least[kVectors];
  for (int64_t v = 0; v < kVectors; ++v) {
    least[v] = broadcast(__builtin_inff());
  }
  float* const room = scores + parents * width;
  constexpr int64_t kDepths = 64; // more are not kept, but added anew
  int32_t depth[kDepths]; // how many rows the sums that are kept have, each more than the last
  int64_t kept = 0;
  for (int64_t i = 0; i < parents; ++i) {
    const int64_t parent = tree.order[i];
    const float* const* own = rows + parent * terms;
    while (kept > 0 && depth[kept - 1] > tree.shared[i]) {
      --kept;
    }
    const int64_t before = kept;
    // The parents to come share less and less with this one: their depths, the longest first.
    int32_t least_shared = static_cast<int32_t>(terms);
    for (int64_t j = i + 1; j < parents && least_shared > tree.shared[i]; ++j) {
      if (tree.shared[j] < least_shared) {
        least_shared = tree.shared[j];
        if (least_shared > tree.shared[i] && kept < kDepths) {
          depth[kept++] = least_shared;
        }
      }
    }
    for (int64_t low = before, high = kept - 1; low < high; ++low, --high) {
      const int32_t other = depth[low];
      depth[low] = depth[high];
      depth[high] = other;
    }
    const float* from = before == 0 ? base : room + (before - 1) * width;
    int64_t done = before == 0 ? 0 : depth[before - 1];
    for (int64_t level = before; level < kept; ++level) {
      float* to = room + level * width;
      add_rows<false>(from, width, own + done, depth[level] - done, to);
      from = to;
      done = depth[level];
    }
    add_rows<true>(
        from,
        width,
        own + done,
        terms - done,
        scores + parent * width,
        parent_score[parent],
        least);
  }
  for (int64_t v = 0; v < kVectors; ++v) {
    store(minima + v * kLanes, least[v]);
  }
}

// The count-th smallest of the minima: at least `count` scores are at most this, and hardly more.
static float bound(const float* minima, int64_t count) {
  float result = __builtin_inff();
  for (int64_t i = 0; i < kMinima; ++i) {
    int64_t below = 0;
    for (int64_t v = 0; v < kVectors; ++v) {
      below += __builtin_popcountll(at_most(load(minima + v * kLanes), broadcast(minima[i])));
    }
    result = below >= count && minima[i] < result ? minima[i] : result;
  }
  return result;
}

// Lists the columns, at most kShortList, whose scores are at most `limit`, in order. Returns how
// many they are, or more than kShortList if they are too many. Without branches on single scores:
// mispredicted, they would cost more than all the arithmetic.
constexpr int64_t kShortList = 16 * kMinima;

static int64_t shortlist(const float* scores, int64_t columns, float limit, int32_t* list) {
  uint16_t hits[64];
  int64_t found = 0;
  for (int64_t start = 0; start < columns; start += 64 * kMinima) {
    const int64_t left = (columns - start) / kMinima;
    const int64_t sets = left < 64 ? left : 64;
    uint64_t hit_sets = 0;
    for (int64_t set = 0; set < sets; ++set) {
      uint64_t good = 0;
      for (int64_t v = 0; v < kVectors; ++v) {
        const Lanes score = load(scores + start + set * kMinima + v * kLanes);
        good |= at_most(score, broadcast(limit)) << (v * kLanes);
      }
      hits[set] = static_cast<uint16_t>(good);
      hit_sets |= static_cast<uint64_t>(good != 0) << set;
    }
    for (; hit_sets != 0; hit_sets &= hit_sets - 1) {
      const int64_t set = __builtin_ctzll(hit_sets);
      for (unsigned good = hits[set]; good != 0; good &= good - 1) {
        if (found == kShortList) {
          return kShortList + 1;
        }
        list[found++] = static_cast<int32_t>(start + set * kMinima + __builtin_ctz(good));
      }
    }
  }
  return found;
}

// Moves the best of a list of columns into the beam by counting, for each, how many are better.
static int64_t rank(const float* scores, const int32_t* list, int64_t found, const Beam& beam) {
  float listed[kShortList];
  int32_t ranked[kShortList];
  const int64_t padded = (found + kMinima - 1) / kMinima * kMinima;
  for (int64_t i = 0; i < padded; ++i) {
    listed[i] = i < found ? scores[list[i]] : __builtin_inff();
  }
  for (int64_t i = 0; i < found; ++i) {
    const Lanes own = broadcast(listed[i]);
    int64_t better = 0;
    int64_t first = 0;
    for (; first + kLanes <= i; first += kLanes) { // equals among these come before
      better += __builtin_popcountll(at_most(load(listed + first), own));
    }
    const uint64_t earlier = (uint64_t{1} << (i - first)) - 1;
    const Lanes others = load(listed + first);
    better += __builtin_popcountll((at_most(others, own) & earlier) | less(others, own));
    for (first += kLanes; first < padded; first += kLanes) {
      better += __builtin_popcountll(less(load(listed + first), own));
    }
    ranked[better] = list[i];
  }
  const int64_t kept = found < beam.capacity ? found : beam.capacity;
  for (int64_t place = 0; place < kept; ++place) {
    beam.score[place] = scores[ranked[place]];
    beam.origin[place] = ranked[place];
  }
  return kept;
}

// The plain way, for wide beams and for many equal scores: insertion in order.
static int64_t insert_all(const float* scores, int64_t columns, const Beam& beam) {
  int64_t count = 0;
  float worst = __builtin_inff(); // what a candidate must beat
  for (int64_t start = 0; start < columns; start += kLanes) {
    uint64_t good = less(load(scores + start), broadcast(worst));
    for (; good != 0; good &= good - 1) {
      const int64_t column = start + __builtin_ctzll(good);
      const float score = scores[column];
      if (!(score < worst)) { // an earlier lane may have raised the bar
        continue;
      }
      int64_t place = count < beam.capacity ? count++ : count - 1;
      for (; place > 0 && beam.score[place - 1] > score; --place) {
        beam.score[place] = beam.score[place - 1];
        beam.origin[place] = beam.origin[place - 1];
      }
      beam.score[place] = score;
      beam.origin[place] = column;
      worst = count == beam.capacity ? beam.score[count - 1] : worst;
    }
  }
  if (count == 0) { // a NaN or an infinity in x: any valid codeword will do
    beam.score[0] = __builtin_inff();
    beam.origin[0] = 0;
    return 1;
  }
  return count;
}

static int64_t extend(
    const float* base,
    int64_t width,
    const float* const* rows,
    int64_t terms,
    const float* parent_score,
    int64_t parents,
    const Tree& tree,
    float* scores,
    const Beam& beam) {
  float minima[kMinima];
  int32_t list[kShortList];
  const int64_t columns = parents * width;
  score_all(base, width, rows, terms, parent_score, parents, tree, scores, minima);
  const float limit = bound(minima, beam.capacity);
  if (limit < __builtin_inff()) {
    const int64_t found = shortlist(scores, columns, limit, list);
    if (found <= kShortList) {
      return rank(scores, list, found, beam);
    }
  }
  return insert_all(scores, columns, beam);
}

static const EncodeKernels kernels = {square, round_row, norms, products, extend};
