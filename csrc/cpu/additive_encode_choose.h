// Which sums are the nearest: those that their scores say could be are looked at themselves.
// Included inside a level's namespace by additive_encode_kernel.h; no include guard on purpose.
// There are few branches on single scores: mispredicted, they would cost more than all arithmetic.

constexpr int64_t kMinima = 16;
constexpr int64_t kRanked = 16 * kMinima; // as many are ranked by counting

// The least score of every kMinima-th column.
COMMVQ_INLINE void least_scores(const int16_t* scores, int64_t columns, int32_t* minima) {
  constexpr int64_t vectors = kLeastWidth / kHalves;
  Halves least[vectors];
  for (int64_t v = 0; v < vectors; ++v) {
    least[v] = broadcast_half(32767);
  }
  for (int64_t k = 0; k < columns; k += kLeastWidth) {
    for (int64_t v = 0; v < vectors; ++v) {
      least[v] = smaller(least[v], load_halves(scores + k + v * kHalves));
    }
  }
  int16_t own[kLeastWidth];
  for (int64_t v = 0; v < vectors; ++v) {
    store_halves(own + v * kHalves, least[v]);
  }
  for (int64_t i = 0; i < kMinima; ++i) {
    minima[i] = own[i] < own[i + kMinima] ? own[i] : own[i + kMinima];
  }
}

// The count-th smallest of the minima: at least `count` scores are at most this, and hardly more.
COMMVQ_INLINE int32_t bound(const int32_t* minima, int64_t count) {
  Ints below[kVectors] = {};
  for (int64_t i = 0; i < kMinima; ++i) {
    const Ints own = minima[i] - Ints{};
    for (int64_t v = 0; v < kVectors; ++v) {
      below[v] = below[v] - (own <= load_ints(minima + v * kLanes));
    }
  }
  const Ints most = 32767 - Ints{};
  int32_t large_enough[kMinima];
  for (int64_t v = 0; v < kVectors; ++v) {
    const Ints own = load_ints(minima + v * kLanes);
    const Ints enough = below[v] >= static_cast<int32_t>(count);
    store_ints(large_enough + v * kLanes, (own & enough) | (most & ~enough));
  }
  int32_t result = 32767;
  for (int64_t i = 0; i < kMinima; ++i) {
    result = large_enough[i] < result ? large_enough[i] : result;
  }
  return result;
}

// The same without hardly more, for any count.
static int32_t narrowest(const int16_t* scores, int64_t columns, int64_t count) {
  int32_t low = -32768, high = 32767;
  while (low < high) {
    const int32_t middle = low + (high - low) / 2;
    const Halves most = broadcast_half(static_cast<int16_t>(middle));
    int64_t found = 0;
    for (int64_t k = 0; k < columns; k += kHalves) {
      found += __builtin_popcount(at_most(load_halves(scores + k), most));
    }
    if (found >= count) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// Lists the columns whose scores are at most `limit`, in order; returns how many they are.
COMMVQ_INLINE int64_t
shortlist(const int16_t* scores, int64_t columns, int16_t limit, int32_t* list) {
  constexpr int64_t kWords = 64; // of 32 columns
  const Halves most = broadcast_half(limit);
  int32_t hits[kWords];
  int64_t found = 0;
  for (int64_t start = 0; start < columns; start += 32 * kWords) {
    const int64_t left = (columns - start) / 32, words = left < kWords ? left : kWords;
    for (int64_t word = 0; word < words; ++word) {
      uint32_t good = 0;
      for (int64_t part = 0; part < 32; part += kHalves) {
        good |= at_most(load_halves(scores + start + word * 32 + part), most) << part;
      }
      hits[word] = static_cast<int32_t>(good);
    }
    uint64_t hit = 0;
    for (int64_t word = words; word % kLanes != 0; ++word) {
      hits[word] = 0;
    }
    for (int64_t word = 0; word < words; word += kLanes) {
      hit |= nonzero(load_ints(hits + word)) << word;
    }
    for (; hit != 0; hit &= hit - 1) {
      const int64_t word = __builtin_ctzll(hit);
      for (auto good = static_cast<uint32_t>(hits[word]); good != 0; good &= good - 1) {
        list[found++] = static_cast<int32_t>(start + word * 32 + __builtin_ctz(good));
      }
    }
  }
  return found;
}

template <int64_t steps>
COMMVQ_INLINE void some_distance(const float* residual, const float* codeword, Lanes* sums) {
  for (int64_t v = 0; v < steps * kVectors; ++v) {
    const Lanes off = load(residual + v * kLanes) - load(codeword + v * kLanes);
    sums[v % kVectors] = sums[v % kVectors] + off * off;
  }
}

// |residual - codeword|^2
COMMVQ_INLINE float distance(const float* residual, const float* codeword, int64_t wide) {
  Lanes sums[kVectors] = {};
  int64_t d = 0;
  for (; d + 4 * kWideStep <= wide; d += 4 * kWideStep) {
    some_distance<4>(residual + d, codeword + d, sums);
  }
  for (; d < wide; d += kWideStep) {
    some_distance<1>(residual + d, codeword + d, sums);
  }
  return folded(sums);
}

// How near each of the listed is: to `nearness`. Columns without a codeword, and distances that are
// not finite, are taken off the list. Returns how many are left. With `residuals` of all parents
// these are read, else each parent's is worked out in `room`.
static int64_t look(
    const Codebooks& books,
    int64_t stage,
    const float* x,
    const Parents& parents,
    const float* residuals,
    const Workspace& room,
    int64_t found) {
  const float* rows = books.stages[stage].rows;
  const float* residual = nullptr;
  int64_t last = -1, left = 0;
  for (int64_t i = 0; i < found; ++i) {
    const int32_t column = room.list[i];
    const int64_t parent = column >> books.shift, k = column & (books.width - 1);
    if (k >= books.codewords) {
      continue;
    }
    if (residuals != nullptr) {
      residual = residuals + parent * books.wide;
    } else if (parent != last) {
      subtract(books, stage, x, parents.codes + parent * parents.stride, room.residuals);
      residual = room.residuals;
      last = parent;
    }
    const float own = distance(residual, rows + k * books.wide, books.wide);
    room.list[left] = column;
    room.nearness[left] = own;
    left += own < __builtin_inff();
  }
  return left;
}

// Moves the nearest of at most kRanked columns into the beam by counting, for each, how many are
// nearer. `nearness` has room up to a multiple of kWideStep.
static int64_t rank(const int32_t* list, float* nearness, int64_t found, const Beam& beam) {
  int32_t ranked[kRanked];
  for (int64_t i = found; i % kLanes != 0; ++i) {
    nearness[i] = __builtin_inff();
  }
  for (int64_t i = 0; i < found; ++i) {
    const Lanes own = broadcast(nearness[i]);
    int64_t nearer = 0, first = 0;
    for (; first + kLanes <= i; first += kLanes) { // equals among these come before
      nearer += __builtin_popcountll(at_most(load(nearness + first), own));
    }
    const uint64_t earlier = (uint64_t{1} << (i - first)) - 1;
    const Lanes others = load(nearness + first);
    nearer += __builtin_popcountll((at_most(others, own) & earlier) | less(others, own));
    for (first += kLanes; first < found; first += kLanes) {
      nearer += __builtin_popcountll(less(load(nearness + first), own));
    }
    ranked[nearer] = static_cast<int32_t>(i);
  }
  const int64_t kept = found < beam.capacity ? found : beam.capacity;
  for (int64_t place = 0; place < kept; ++place) {
    beam.score[place] = nearness[ranked[place]];
    beam.origin[place] = list[ranked[place]];
  }
  return kept;
}

// The plain way, for wide beams and for many equal scores: insertion in order.
static int64_t insert_all(
    const int32_t* list, const float* nearness, int64_t found, const Beam& beam) {
  int64_t count = 0;
  for (int64_t i = 0; i < found; ++i) {
    const float own = nearness[i];
    if (count == beam.capacity && !(own < beam.score[count - 1])) {
      continue;
    }
    int64_t place = count < beam.capacity ? count++ : count - 1;
    for (; place > 0 && beam.score[place - 1] > own; --place) {
      beam.score[place] = beam.score[place - 1];
      beam.origin[place] = beam.origin[place - 1];
    }
    beam.score[place] = own;
    beam.origin[place] = list[i];
  }
  return count;
}
