// How one call of additive_attend reads its keys: panels, groups of stages, and small turns.
#pragma once

#include "common/buffer.h"
#include "cpu/additive_attend.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace commvq {

// A key's numbers stay within this, so that one rotated still fits int16: the caller's promise.
constexpr double kMostKey = 23000.0;

struct KeyPlan {
  int64_t heads, subs, stages, sub_dim, group, groups, pairs, panel_count, width;
  const int8_t* words; // [heads, subs, stages, 256, sub_dim]
  bool plain;          // panels hold a head's dims without gaps, and all of them rotate
  Buffer<Panel> panels;
  Buffer<int32_t> places;  // [subs * sub_dim]: where a dim goes in a row
  Buffer<int16_t> means;   // [heads, width]
  Buffer<int16_t> steps;   // [kTurn, 2, width / 2], units of 2^-15
  Buffer<int16_t> gains;   // [heads * subs, groups, kPanel]
  Buffer<uint8_t> turning; // [panel_count]

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
      : heads(heads),
        subs(subs),
        stages(stages),
        sub_dim(sub_dim),
        group(group),
        groups((stages + group - 1) / group),
        pairs(pairs),
        panel_count(subs * ((sub_dim + kPanel - 1) / kPanel)),
        width(panel_count * kPanel),
        words(words),
        plain(width == subs * sub_dim && 2 * pairs == width),
        panels(panel_count),
        places(subs * sub_dim),
        means(heads * width),
        steps(kTurn * width),
        gains(heads * subs * groups * kPanel),
        turning(panel_count) {
    const int64_t dim = subs * sub_dim, in_sub = panel_count / subs;
    for (int64_t p = 0; p < panel_count; ++p) {
      const int64_t begin = p % in_sub * kPanel;
      panels[p] = {p / in_sub, begin, std::min(sub_dim - begin, kPanel)};
      turning[p] = panels[p].sub * sub_dim + begin < 2 * pairs;
    }
    std::fill(means.data(), means.data() + heads * width, int16_t{0});
    std::fill(steps.data(), steps.data() + kTurn * width, int16_t{0});
    for (int64_t d = 0; d < dim; ++d) {
      const int64_t within = d % sub_dim, panel = d / sub_dim * in_sub + within / kPanel;
      places[d] = static_cast<int32_t>(panel * kPanel + d % 2 * kHalf + within % kPanel / 2);
      for (int64_t head = 0; head < heads; ++head) {
        means[head * width + places[d]] = mean[head * dim + d];
      }
    }
    for (int64_t pair = 0; pair < dim / 2; ++pair) {
      for (int64_t t = 0; t < kTurn; ++t) {
        const float* own = step + t * 2 * pairs + pair;
        int16_t* to = steps.data() + t * width + pair_place(pair);
        to[0] = fixed(pair < pairs ? own[0] : 1.0f);
        to[width / 2] = fixed(pair < pairs ? own[pairs] : 0.0f);
      }
    }
    for (int64_t sub = 0; sub < heads * subs; ++sub, gain += stages) {
      for (int64_t own = 0; own < groups; ++own) {
        int16_t* to = gains.data() + (sub * groups + own) * kPanel;
        std::fill(to, to + kHalf, static_cast<int16_t>(gain[own * group]));
        std::fill(to + kHalf, to + kPanel, static_cast<int16_t>(gain[own * group] << 8));
      }
    }
  }

  // Where a pair's cosine is among half a row of them.
  int64_t pair_place(int64_t pair) const {
    const int64_t place = places[2 * pair];
    return place / kPanel * kHalf + place % kPanel;
  }

  // How long a query in whole numbers may be for its inner products to fit int32.
  double most_query() const {
    return 2147483647.0 * 0.99 / (kMostKey * std::sqrt(static_cast<double>(subs * sub_dim)));
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
        words + head * subs * stages * 256 * sub_dim,
        gains.data() + head * subs * groups * kPanel,
        means.data() + head * width,
        turning.data()};
  }

 private:
  static int16_t fixed(float x) {
    return static_cast<int16_t>(std::clamp(std::nearbyint(x * 32768.0f), -32768.0f, 32767.0f));
  }
};

} // namespace commvq
