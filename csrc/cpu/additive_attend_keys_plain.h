// Keys in whole numbers, in loops that compilers make vectors of; see additive_attend_keys.h.

// (a * b + 2^14) >> 15
COMMVQ_INLINE int16_t scaled(int16_t a, int16_t b) {
  return static_cast<int16_t>((static_cast<int32_t>(a) * b + 0x4000) >> 15);
}

// Adds `gain` times the sum of a group's codewords to the two halves of a panel. Loops over kHalf
// or over bytes: the compiler makes vectors of them.
COMMVQ_INLINE void add_group(
    const uint8_t* codes,
    const int8_t* words,
    int64_t stages,
    int64_t sub_dim,
    int64_t dims,
    int16_t gain,
    int16_t* panel) {
  alignas(64) int8_t sum[kPanel] = {};
  for (int64_t stage = 0; stage < stages; ++stage) {
    const int8_t* word = words + (stage * 256 + codes[stage]) * sub_dim;
    for (int64_t dim = 0; dim < dims; ++dim) {
      sum[dim] = static_cast<int8_t>(sum[dim] + word[dim]);
    }
  }
  for (int64_t i = 0; i < kHalf; ++i) {
    panel[i] = static_cast<int16_t>(panel[i] + gain * sum[2 * i]);
    panel[kHalf + i] = static_cast<int16_t>(panel[kHalf + i] + gain * sum[2 * i + 1]);
  }
}

template <bool whole>
COMMVQ_INLINE void decode_panel(const uint8_t* codes, const KeyHead& head, int64_t p, int16_t* to) {
  const Panel panel = head.panels[p];
  const int64_t sub_dim = whole ? kPanel : head.sub_dim, dims = whole ? kPanel : panel.count;
  const int8_t* words = head.words + panel.sub * head.stages * 256 * sub_dim + panel.begin;
  const uint8_t* gains = head.gains + panel.sub * head.duos * kPanel;
  for (int64_t i = 0; i < kPanel; ++i) {
    to[i] = head.mean[p * kPanel + i];
  }
  for (int64_t at = 0, stage = 0; at < head.groups; ++at, stage += head.group) {
    const int64_t left = head.stages - stage, stages = left < head.group ? left : head.group;
    const int8_t* own = words + stage * 256 * sub_dim;
    const int16_t gain = gains[at / 2 * kPanel + at % 2];
    add_group(codes + stage, own, stages, sub_dim, dims, gain, to);
  }
}

COMMVQ_INLINE void turn_panel(int16_t* panel, const int16_t* cosine, const int16_t* sine) {
  for (int64_t i = 0; i < kHalf; ++i) {
    const int16_t re = panel[i], im = panel[kHalf + i];
    panel[i] = static_cast<int16_t>(scaled(re, cosine[i]) - scaled(im, sine[i]));
    panel[kHalf + i] = static_cast<int16_t>(scaled(im, cosine[i]) + scaled(re, sine[i]));
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
  for (int64_t r = 0; r < kQuad; ++r, query += width) {
    for (int64_t token = 0; token < count; ++token) {
      const int16_t* key = rows + token * width;
      uint32_t sum = 0; // wraps, as vectors do, where the caller broke the promise
      for (int64_t i = 0; i < width; ++i) {
        sum += static_cast<uint32_t>(static_cast<int32_t>(key[i]) * query[i]);
      }
      scores[token * tile + r] = static_cast<float>(static_cast<int32_t>(sum)) * unit[r];
    }
  }
}

// `turn` may be null: none.
COMMVQ_INLINE void decode_rows(
    const uint8_t* codes,
    int64_t stride,
    int64_t count,
    const KeyHead& head,
    const int16_t* steps,
    const int16_t* turn,
    int16_t* keys) {
  const int64_t width = head.width;
  for (int64_t p = 0; p < head.panel_count; ++p) {
    const uint8_t* code = codes + head.panels[p].sub * head.stages;
    for (int64_t token = 0; token < count; ++token, code += stride) {
      int16_t* to = keys + token * width + p * kPanel;
      if (head.sub_dim == kPanel) {
        decode_panel<true>(code, head, p, to);
      } else {
        decode_panel<false>(code, head, p, to);
      }
      if (head.turns[p] != 0) {
        const int16_t* step = steps + token * width + p * kHalf;
        turn_panel(to, step, step + width / 2);
        if (turn != nullptr) {
          turn_panel(to, turn + p * kHalf, turn + p * kHalf + width / 2);
        }
      }
    }
  }
}

static void decode_keys(
    const uint8_t* codes,
    int64_t stride,
    int64_t count,
    const KeyHead& head,
    const int16_t* steps,
    const int16_t* turn,
    int16_t* keys) {
  decode_rows(codes, stride, count, head, steps, turn, keys);
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
  const int64_t width = head.width;
  decode_rows(codes, stride, count, head, steps, nullptr, keys);
  for (int64_t r = 0; r < rows; r += kQuad) {
    float* to = scores.data + r / scores.tile * scores.tokens * scores.tile + r % scores.tile;
    score_rows(keys, count, width, query + r * width, unit + r, to, scores.tile);
  }
}
