// Keys in whole numbers with AVX-512 and its VNNI; see additive_attend_keys.h.

// GCC 12 warns of the unmasked forms.
COMMVQ_INLINE __m512i interleaved_sum32(__m512i a, __m512i b) {
  return _mm512_add_epi32(
      _mm512_maskz_unpacklo_epi32(0xffff, a, b), _mm512_maskz_unpackhi_epi32(0xffff, a, b));
}
COMMVQ_INLINE __m512i interleaved_sum64(__m512i a, __m512i b) {
  return _mm512_add_epi32(
      _mm512_maskz_unpacklo_epi64(0xff, a, b), _mm512_maskz_unpackhi_epi64(0xff, a, b));
}

// Four vectors of 16 partial sums -> four partial sums of each, in turns.
COMMVQ_INLINE __m512i fourths(__m512i a, __m512i b, __m512i c, __m512i d) {
  return interleaved_sum64(interleaved_sum32(a, b), interleaved_sum32(c, d));
}

// Those of four tokens -> their sums, a token after the other.
COMMVQ_INLINE __m512i of_four(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(
      _mm512_maskz_shuffle_i64x2(0xff, a, b, 0x44), _mm512_maskz_shuffle_i64x2(0xff, a, b, 0xee));
  const __m512i cd = _mm512_add_epi32(
      _mm512_maskz_shuffle_i64x2(0xff, c, d, 0x44), _mm512_maskz_shuffle_i64x2(0xff, c, d, 0xee));
  return _mm512_add_epi32(
      _mm512_maskz_shuffle_i64x2(0xff, ab, cd, 0x88),
      _mm512_maskz_shuffle_i64x2(0xff, ab, cd, 0xdd));
}

// Four vectors of 16 partial sums -> their four sums.
COMMVQ_INLINE __m128i four_sums(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i all = fourths(a, b, c, d);
  const __m256i low = __builtin_shufflevector(all, all, 0, 1, 2, 3);
  const __m256i high = __builtin_shufflevector(all, all, 4, 5, 6, 7);
  const __m256i half = _mm256_add_epi32(low, high);
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

struct Pairs {
  __m512i re, im;
};

// The sum of `stages` codewords of one group, in bytes.
template <bool whole>
COMMVQ_INLINE __m512i
added(const uint8_t* codes, int64_t stages, const int8_t* words, int64_t sub_dim, __mmask64 dims) {
  __m512i bytes = _mm512_setzero_si512();
  for (int64_t stage = 0; stage < stages; ++stage) {
    const int64_t row = stage * 256 + codes[stage];
    const __m512i word = whole ? _mm512_loadu_si512(words + row * kPanel)
                               : _mm512_maskz_loadu_epi8(dims, words + row * sub_dim);
    bytes = stage == 0 ? word : _mm512_add_epi8(bytes, word);
  }
  return bytes;
}

// Adds two groups' gains times their bytes. The bytes of both take turns, the even dims' in one
// vector and the odd ones' in another, so that one multiplication widens, weighs and adds them.
COMMVQ_INLINE Pairs add_groups(Pairs sum, __m512i a, __m512i b, const uint8_t* gains) {
  const __m512i gain = _mm512_loadu_si512(gains);
  const __m512i swap = _mm512_set4_epi32(0x0e0f0c0d, 0x0a0b0809, 0x06070405, 0x02030001);
  const __m512i even = _mm512_mask_shuffle_epi8(a, 0xaaaaaaaaaaaaaaaa, b, swap);
  const __m512i odd = _mm512_mask_shuffle_epi8(b, 0x5555555555555555, a, swap);
  return {
      _mm512_add_epi16(sum.re, _mm512_maddubs_epi16(gain, even)),
      _mm512_add_epi16(sum.im, _mm512_maddubs_epi16(gain, odd))};
}

// One panel of a key: `full` whole groups (2 or 4), if it is not 0, else as many as `head` says.
template <int group, int full, bool whole>
COMMVQ_INLINE Pairs decoded(
    const uint8_t* codes,
    const KeyHead& head,
    const int8_t* words,
    __mmask64 dims,
    const uint8_t* gains,
    const int16_t* mean) {
  const int64_t sub_dim = whole ? kPanel : head.sub_dim, step = group * 256 * sub_dim;
  Pairs sum = {_mm512_loadu_si512(mean), _mm512_loadu_si512(mean + kHalf)};
  if (full > 0) {
    for (int64_t at = 0; at < full; at += 2, gains += kPanel) {
      const __m512i a = added<whole>(codes + at * group, group, words + at * step, sub_dim, dims);
      const uint8_t* next = codes + (at + 1) * group;
      const __m512i b = added<whole>(next, group, words + (at + 1) * step, sub_dim, dims);
      sum = add_groups(sum, a, b, gains);
    }
    return sum;
  }
  for (int64_t left = head.stages; left > 0; left -= 2 * group, gains += kPanel) {
    const int64_t first = left < group ? left : group, rest = left - first;
    const int64_t second = rest < group ? rest : group;
    const __m512i a = added<whole>(codes, first, words, sub_dim, dims);
    const __m512i b = added<whole>(codes + group, second, words + step, sub_dim, dims);
    sum = add_groups(sum, a, b, gains);
    codes += 2 * group;
    words += 2 * step;
  }
  return sum;
}

COMMVQ_INLINE Pairs turned(Pairs x, const int16_t* step, int64_t width) {
  __m512i cosine = _mm512_loadu_si512(step), sine = _mm512_loadu_si512(step + width / 2);
  __asm__("" : "+v"(cosine), "+v"(sine)); // or both would be read twice
  return {
      _mm512_sub_epi16(_mm512_mulhrs_epi16(x.re, cosine), _mm512_mulhrs_epi16(x.im, sine)),
      _mm512_add_epi16(_mm512_mulhrs_epi16(x.im, cosine), _mm512_mulhrs_epi16(x.re, sine))};
}

struct Quad {
  __m512i rows[kQuad];
};

// One panel, whole, of a key as it is scored.
template <int group, int full>
COMMVQ_INLINE Pairs
panel_of(const uint8_t* codes, const KeyHead& head, int64_t p, const int16_t* step) {
  const int64_t book = head.stages * 256 * kPanel, gains = head.duos * kPanel;
  const Pairs key = decoded<group, full, true>(
      codes + p * head.stages,
      head,
      head.words + p * book,
      ~__mmask64{0},
      head.gains + p * gains,
      head.mean + p * kPanel);
  return head.turns[p] != 0 ? turned(key, step + p * kHalf, head.width) : key;
}

// Adds one panel's part of four inner products.
COMMVQ_INLINE Quad add_products(Quad sums, const Pairs& key, const Quad& re, const Quad& im) {
  for (int r = 0; r < kQuad; ++r) {
    sums.rows[r] = _mm512_dpwssd_epi32(sums.rows[r], key.re, re.rows[r]);
    sums.rows[r] = _mm512_dpwssd_epi32(sums.rows[r], key.im, im.rows[r]);
  }
  return sums;
}

COMMVQ_INLINE Quad query_part(const int16_t* query, int64_t width, int64_t at) {
  Quad part;
  for (int r = 0; r < kQuad; ++r) {
    part.rows[r] = _mm512_loadu_si512(query + r * width + at);
  }
  return part;
}

// One quad of queries and one or two whole panels: queries stay in registers and keys never leave
// them.
template <int group, int full, int panels>
static void score_fused(
    const uint8_t* codes,
    int64_t stride,
    int64_t count,
    const KeyHead& head,
    const int16_t* steps,
    const int16_t* query,
    const float* unit,
    float* scores) {
  KeyHead own = head; // stores to scores might change what `head` refers to
  own.width = panels * kPanel;
  const Quad re = query_part(query, own.width, 0), im = query_part(query, own.width, kHalf);
  const int64_t second = panels > 1 ? kPanel : 0;
  const Quad re2 = query_part(query, own.width, second);
  const Quad im2 = query_part(query, own.width, second + kHalf);
  alignas(64) int32_t parts[kTurn * kSums];
  // The next key is decoded while this one is multiplied.
  Pairs key = panel_of<group, full>(codes, own, 0, steps);
  Pairs key2 = panels > 1 ? panel_of<group, full>(codes, own, 1, steps) : key;
  for (int64_t token = 0; token < count; ++token) {
    if (token + 1 < count) {
      codes += stride;
      steps += own.width;
    }
    Quad sums = {};
    sums = add_products(sums, key, re, im);
    key = panel_of<group, full>(codes, own, 0, steps);
    if (panels > 1) {
      sums = add_products(sums, key2, re2, im2);
      key2 = panel_of<group, full>(codes, own, 1, steps);
    }
    _mm512_store_si512(
        parts + token * kSums, fourths(sums.rows[0], sums.rows[1], sums.rows[2], sums.rows[3]));
  }
  const __m512 units = _mm512_maskz_broadcast_f32x4(0xffff, _mm_loadu_ps(unit));
  for (int64_t token = 0; token < count; token += 4) {
    const int32_t* at = parts + token * kSums;
    const __m512i four = of_four(
        _mm512_load_si512(at),
        _mm512_load_si512(at + kSums),
        _mm512_load_si512(at + 2 * kSums),
        _mm512_load_si512(at + 3 * kSums));
    const __mmask16 left = 0xffff >> (count - token < 4 ? 4 * (4 - (count - token)) : 0);
    const __m512 score = _mm512_mul_ps(_mm512_maskz_cvtepi32_ps(0xffff, four), units);
    _mm512_mask_storeu_ps(scores + token * kQuad, left, score);
  }
}

template <int group, bool whole>
static void decode_rows(
    const uint8_t* codes,
    int64_t stride,
    int64_t count,
    const KeyHead& head,
    int64_t p,
    const int16_t* steps,
    int16_t* rows) {
  const Panel panel = head.panels[p];
  const __mmask64 dims = ~__mmask64{0} >> (kPanel - panel.count);
  const int8_t* words = head.words + panel.sub * head.stages * 256 * head.sub_dim + panel.begin;
  const uint8_t* gains = head.gains + panel.sub * head.duos * kPanel;
  codes += panel.sub * head.stages;
  for (int64_t token = 0; token < count; ++token, codes += stride) {
    Pairs key = decoded<group, 0, whole>(codes, head, words, dims, gains, head.mean + p * kPanel);
    if (head.turns[p] != 0) {
      key = turned(key, steps + token * head.width + p * kHalf, head.width);
    }
    int16_t* to = rows + token * head.width + p * kPanel;
    _mm512_storeu_si512(to, key.re);
    _mm512_storeu_si512(to + kHalf, key.im);
  }
}

static void score_rows(
    const int16_t* rows,
    int64_t count,
    int64_t width,
    const int16_t* query,
    const float* unit,
    float* scores,
    int64_t tile) {
  const __m128 units = _mm_loadu_ps(unit);
  for (int64_t token = 0; token < count; ++token, rows += width) {
    __m512i sums[kQuad] = {};
    for (int64_t i = 0; i < width; i += kHalf) {
      const __m512i key = _mm512_loadu_si512(rows + i);
      for (int r = 0; r < kQuad; ++r) {
        sums[r] = _mm512_dpwssd_epi32(sums[r], key, _mm512_loadu_si512(query + r * width + i));
      }
    }
    const __m128i four = four_sums(sums[0], sums[1], sums[2], sums[3]);
    _mm_storeu_ps(scores + token * tile, _mm_mul_ps(_mm_cvtepi32_ps(four), units));
  }
}

template <int group>
COMMVQ_INLINE void decode_group(
    const uint8_t* codes,
    int64_t stride,
    int64_t count,
    const KeyHead& head,
    const int16_t* steps,
    int16_t* keys) {
  for (int64_t p = 0; p < head.panel_count; ++p) {
    const bool whole = head.sub_dim == kPanel;
    const auto decode = whole ? decode_rows<group, true> : decode_rows<group, false>;
    decode(codes, stride, count, head, p, steps, keys);
  }
}

template <int group>
static void score_group(
    const uint8_t* codes,
    int64_t stride,
    int64_t count,
    const KeyHead& head,
    const int16_t* steps,
    const int16_t* query,
    int64_t rows,
    const float* unit,
    int16_t* keys,
    const Scores& scores) {
  const bool whole = head.sub_dim == kPanel;
  if (whole && rows == kQuad && scores.tile == kQuad && head.panel_count <= 2) {
    // The default's geometries at one and two bits have no loop over groups.
    const bool one = head.panel_count == 1, no_rest = head.stages % group == 0;
    auto score = one ? score_fused<group, 0, 1> : score_fused<group, 0, 2>;
    if (no_rest && head.groups == 2) {
      score = one ? score_fused<group, 2, 1> : score_fused<group, 2, 2>;
    } else if (no_rest && head.groups == 4) {
      score = one ? score_fused<group, 4, 1> : score_fused<group, 4, 2>;
    }
    score(codes, stride, count, head, steps, query, unit, scores.data);
    return;
  }
  decode_group<group>(codes, stride, count, head, steps, keys);
  for (int64_t r = 0; r < rows; r += kQuad) {
    float* to = scores.data + r / scores.tile * scores.tokens * scores.tile + r % scores.tile;
    score_rows(keys, count, head.width, query + r * head.width, unit + r, to, scores.tile);
  }
}

static void score_keys(
    const uint8_t* codes,
    int64_t stride,
    int64_t count,
    const KeyHead& head,
    const int16_t* steps,
    const int16_t* query,
    int64_t rows,
    const float* unit,
    int16_t* keys,
    const Scores& scores) {
  const auto score = head.group == 4   ? score_group<4>
                     : head.group == 2 ? score_group<2>
                                       : score_group<1>;
  score(codes, stride, count, head, steps, query, rows, unit, keys, scores);
}

static void decode_keys(
    const uint8_t* codes,
    int64_t stride,
    int64_t count,
    const KeyHead& head,
    const int16_t* steps,
    const int16_t* turn,
    int16_t* keys) {
  if (head.group == 4) {
    decode_group<4>(codes, stride, count, head, steps, keys);
  } else if (head.group == 2) {
    decode_group<2>(codes, stride, count, head, steps, keys);
  } else {
    decode_group<1>(codes, stride, count, head, steps, keys);
  }
  for (int64_t token = 0; token < count; ++token) {
    for (int64_t p = 0; p < head.panel_count; ++p) {
      int16_t* at = keys + token * head.width + p * kPanel;
      if (head.turns[p] != 0) {
        const Pairs key = {_mm512_loadu_si512(at), _mm512_loadu_si512(at + kHalf)};
        const Pairs last = turned(key, turn + p * kHalf, head.width);
        _mm512_storeu_si512(at, last.re);
        _mm512_storeu_si512(at + kHalf, last.im);
      }
    }
  }
}
