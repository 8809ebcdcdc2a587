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

// Four vectors of 16 partial sums -> their four sums.
COMMVQ_INLINE __m128i four_sums(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i all = interleaved_sum64(interleaved_sum32(a, b), interleaved_sum32(c, d));
  const __m256i low = __builtin_shufflevector(all, all, 0, 1, 2, 3);
  const __m256i high = __builtin_shufflevector(all, all, 4, 5, 6, 7);
  const __m256i half = _mm256_add_epi32(low, high);
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

struct Pairs {
  __m512i re, im;
};

// Adds a group's gain times its codewords. Bytes are widened by the multiplication itself: a gain
// in the low byte of a number meets the even dims, one in the high byte the odd ones.
template <int stages, bool whole>
COMMVQ_INLINE Pairs add_group(
    Pairs sum,
    const uint8_t* codes,
    const int8_t* words,
    int64_t sub_dim,
    __mmask64 dims,
    const int16_t* gains) {
  __m512i bytes = _mm512_setzero_si512();
  for (int stage = 0; stage < stages; ++stage) {
    const int64_t row = stage * 256 + codes[stage];
    const __m512i word = whole ? _mm512_loadu_si512(words + row * kPanel)
                               : _mm512_maskz_loadu_epi8(dims, words + row * sub_dim);
    bytes = stage == 0 ? word : _mm512_add_epi8(bytes, word);
  }
  return {
      _mm512_add_epi16(sum.re, _mm512_maddubs_epi16(_mm512_loadu_si512(gains), bytes)),
      _mm512_add_epi16(sum.im, _mm512_maddubs_epi16(_mm512_loadu_si512(gains + kHalf), bytes))};
}

// One panel of a key: `full` whole groups, if it is not 0, else as many as `head` says.
template <int group, int full, bool whole>
COMMVQ_INLINE Pairs decoded(
    const uint8_t* codes,
    const KeyHead& head,
    const int8_t* words,
    __mmask64 dims,
    const int16_t* gains,
    const int16_t* mean) {
  const int64_t sub_dim = whole ? kPanel : head.sub_dim, step = group * 256 * sub_dim;
  Pairs sum = {_mm512_loadu_si512(mean), _mm512_loadu_si512(mean + kHalf)};
  if (full > 0) {
    sum = add_group<group, whole>(sum, codes, words, sub_dim, dims, gains);
    if (full > 1) {
      words += step;
      sum = add_group<group, whole>(sum, codes + group, words, sub_dim, dims, gains + kPanel);
    }
    if (full > 2) {
      words += step;
      gains += 2 * kPanel;
      sum = add_group<group, whole>(sum, codes + 2 * group, words, sub_dim, dims, gains);
    }
    if (full > 3) {
      words += step;
      sum = add_group<group, whole>(sum, codes + 3 * group, words, sub_dim, dims, gains + kPanel);
    }
    return sum;
  }
  const int64_t rest = group == 1 ? 0 : head.stages % group, stop = head.stages - rest;
  for (int64_t stage = 0; stage < stop; stage += group, words += step, gains += kPanel) {
    sum = add_group<group, whole>(sum, codes + stage, words, sub_dim, dims, gains);
  }
  codes += stop;
  if (rest == 1) {
    return add_group<1, whole>(sum, codes, words, sub_dim, dims, gains);
  }
  if (rest == 2) {
    return add_group<2, whole>(sum, codes, words, sub_dim, dims, gains);
  }
  if (rest == 3) {
    return add_group<3, whole>(sum, codes, words, sub_dim, dims, gains);
  }
  return sum;
}

COMMVQ_INLINE Pairs turned(Pairs x, const int16_t* step, int64_t width) {
  const __m512i cosine = _mm512_loadu_si512(step), sine = _mm512_loadu_si512(step + width / 2);
  return {
      _mm512_sub_epi16(_mm512_mulhrs_epi16(x.re, cosine), _mm512_mulhrs_epi16(x.im, sine)),
      _mm512_add_epi16(_mm512_mulhrs_epi16(x.im, cosine), _mm512_mulhrs_epi16(x.re, sine))};
}

struct Quad {
  __m512i rows[kQuad];
};

// Adds one panel's part of four inner products.
template <int group, int full>
COMMVQ_INLINE Quad add_panel(
    Quad sums,
    const uint8_t* codes,
    const KeyHead& head,
    int64_t p,
    const int16_t* step,
    const Quad& re,
    const Quad& im) {
  const int64_t book = head.stages * 256 * kPanel, gains = head.groups * kPanel;
  Pairs key = decoded<group, full, true>(
      codes + p * head.stages,
      head,
      head.words + p * book,
      ~__mmask64{0},
      head.gains + p * gains,
      head.mean + p * kPanel);
  if (head.turns[p] != 0) {
    key = turned(key, step + p * kHalf, head.width);
  }
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
    float* scores,
    int64_t tile) {
  KeyHead own = head; // stores to scores might change what `head` refers to
  own.width = panels * kPanel;
  const Quad re = query_part(query, own.width, 0), im = query_part(query, own.width, kHalf);
  const int64_t second = panels > 1 ? kPanel : 0;
  const Quad re2 = query_part(query, own.width, second);
  const Quad im2 = query_part(query, own.width, second + kHalf);
  const __m128 units = _mm_loadu_ps(unit);
  for (int64_t token = 0; token < count; ++token, codes += stride, steps += own.width) {
    Quad sums = {};
    sums = add_panel<group, full>(sums, codes, own, 0, steps, re, im);
    if (panels > 1) {
      sums = add_panel<group, full>(sums, codes, own, 1, steps, re2, im2);
    }
    const __m128i four = four_sums(sums.rows[0], sums.rows[1], sums.rows[2], sums.rows[3]);
    _mm_storeu_ps(scores + token * tile, _mm_mul_ps(_mm_cvtepi32_ps(four), units));
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
  const int16_t* gains = head.gains + panel.sub * head.groups * kPanel;
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
  if (whole && rows == kQuad && head.panel_count <= 2) {
    // The default's geometries at one and two bits have no loop over groups.
    const bool one = head.panel_count == 1, no_rest = head.stages % group == 0;
    auto score = one ? score_fused<group, 0, 1> : score_fused<group, 0, 2>;
    if (no_rest && head.groups == 2) {
      score = one ? score_fused<group, 2, 1> : score_fused<group, 2, 2>;
    } else if (no_rest && head.groups == 4) {
      score = one ? score_fused<group, 4, 1> : score_fused<group, 4, 2>;
    }
    score(codes, stride, count, head, steps, query, unit, scores.data, scores.tile);
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
