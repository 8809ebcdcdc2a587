// How one call of additive_attend reads its keys: rows in panels, and groups of stages.
#pragma once

#include "cpu/attend_rows.h"

namespace commvq {

struct KeyPlan : RowPlan {
  int64_t heads, stages, group, groups, duos;
  const int8_t* words;   // [heads, subs, stages, 256, sub_dim]
  Buffer<int16_t> means; // [heads, width]
  Buffer<uint8_t> gains; // [heads * subs, duos, kPanel]

  // `gain` [heads, subs, stages] is every stage's, `mean` [heads, dim]; `step` [kTurn, 2, pairs]
  // are cosines and sines of the pairs that rotate.
  KeyPlan(
      int64_t heads,
      int64_t subs,
      int64_t stages,
      int64_t sub_dim,
      int64_t group,
      int64_t pairs,
      const int8_t* words,
      const uint8_t* gain,
      const int16_t* mean,
      const float* step)
      : RowPlan(subs, sub_dim, pairs, step),
        heads(heads),
        stages(stages),
        group(group),
        groups((stages + group - 1) / group),
        duos((groups + 1) / 2),
        words(words),
        means(heads * width),
        gains(heads * subs * duos * kPanel) {
    const int64_t dim = subs * sub_dim;
    std::fill(means.data(), means.data() + heads * width, int16_t{0});
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t d = 0; d < dim; ++d) {
        means[head * width + places[d]] = mean[head * dim + d];
      }
    }
    for (int64_t sub = 0; sub < heads * subs; ++sub, gain += stages) {
      for (int64_t duo = 0; duo < duos; ++duo) {
        uint8_t* to = gains.data() + (sub * duos + duo) * kPanel;
        for (int64_t i = 0; i < kPanel; ++i) {
          const int64_t stage = (2 * duo + i % 2) * group;
          to[i] = stage < stages ? gain[stage] : 0;
        }
      }
    }
  }

  KeyHead of(int64_t head) const {
    return {
        panel_count,
        width,
        panels.data(),
        sub_dim,
        stages,
        group,
        groups,
        duos,
        words + head * subs * stages * 256 * sub_dim,
        gains.data() + head * subs * duos * kPanel,
        means.data() + head * width,
        turning.data()};
  }
};

} // namespace commvq
