// How rows of whole numbers lie in panels and turn, for any attention over codes.
#pragma once

#include "common/buffer.h"
#include "cpu/additive_attend.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace commvq {

// A key's numbers stay within this, so that one rotated still fits int16: the caller's promise.
constexpr double kMostKey = 23000.0;

struct RowPlan {
  int64_t subs, sub_dim, pairs, panel_count, width;
  bool plain; // panels hold a head's dims without gaps, and all of them rotate
  Buffer<Panel> panels;
  Buffer<int32_t> places;  // [subs * sub_dim]: where a dim goes in a row
  Buffer<int16_t> steps;   // [kTurn, 2, width / 2], units of 2^-15
  Buffer<uint8_t> turning; // [panel_count]

  // `step` [kTurn, 2, pairs] are cosines and sines of the pairs that rotate.
  RowPlan(int64_t subs, int64_t sub_dim, int64_t pairs, const float* step)
      : subs(subs),
        sub_dim(sub_dim),
        pairs(pairs),
        panel_count(subs * ((sub_dim + kPanel - 1) / kPanel)),
        width(panel_count * kPanel),
        plain(width == subs * sub_dim && 2 * pairs == width),
        panels(panel_count),
        places(subs * sub_dim),
        steps(kTurn * width),
        turning(panel_count) {
    const int64_t dim = subs * sub_dim, in_sub = panel_count / subs;
    for (int64_t p = 0; p < panel_count; ++p) {
      const int64_t begin = p % in_sub * kPanel;
      panels[p] = {p / in_sub, begin, std::min(sub_dim - begin, kPanel)};
      turning[p] = panels[p].sub * sub_dim + begin < 2 * pairs;
    }
    for (int64_t d = 0; d < dim; ++d) {
      const int64_t within = d % sub_dim, panel = d / sub_dim * in_sub + within / kPanel;
      places[d] = static_cast<int32_t>(panel * kPanel + d % 2 * kHalf + within % kPanel / 2);
    }
    const Buffer<float> angles(width);
    for (int64_t t = 0; t < kTurn; ++t) {
      const float* own = angles_of(step + t * 2 * pairs, angles.data());
      for (int64_t i = 0; i < width; ++i) {
        steps[t * width + i] = fixed(own[i]);
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
    const double longest = kMostKey * std::sqrt(static_cast<double>(subs * sub_dim));
    return std::min(2147483647.0 * 0.98 / longest, 32700.0);
  }

  // How many times finer a query may be before it turns, a power of two, and still fit int16.
  double finer() const { return std::exp2(std::floor(std::log2(32767.0 / most_query()))); }

  // What turning takes of it.
  float share() const { return static_cast<float>(1.0 / finer()); }

  // What makes a query [dim] that long; 0 for one of zeros.
  double factor_of(const float* query) const {
    double square = 0.0;
    for (int64_t d = 0; d < subs * sub_dim; ++d) {
      square += static_cast<double>(query[d]) * query[d];
    }
    return square > 0.0 ? most_query() / std::sqrt(square) : 0.0;
  }

  // `count` queries [dim] in panels, as large as their inner products with keys allow, since they
  // are rounded to whole numbers, and `finer` times that; a row's unit is what one of its numbers
  // is worth once it has turned. Rows up to `padded` are zeros.
  void scale(const float* from, int64_t count, int64_t padded, int16_t* to, float* units) const {
    const int64_t dim = subs * sub_dim;
    const double finest = finer();
    std::fill(to, to + padded * width, int16_t{0});
    std::fill(units, units + padded, 0.0f);
    for (int64_t r = 0; r < count; ++r, from += dim, to += width) {
      const double factor = factor_of(from), fine = factor * finest;
      if (factor > 0.0) {
        units[r] = static_cast<float>(1.0 / factor);
        for (int64_t d = 0; d < dim; ++d) {
          to[places[d]] = static_cast<int16_t>(std::lrint(from[d] * fine));
        }
      }
    }
  }

  // Cosines, then sines, of one block's start [2, pairs] in the order of half a row; `angles`
  // [width] is where they go unless they are in that order.
  const float* angles_of(const float* turn, float* angles) const {
    if (plain) {
      return turn;
    }
    const int64_t half = width / 2;
    std::fill(angles, angles + half, 1.0f);
    std::fill(angles + half, angles + width, 0.0f);
    for (int64_t pair = 0; pair < pairs; ++pair) {
      angles[pair_place(pair)] = turn[pair];
      angles[half + pair_place(pair)] = turn[pairs + pair];
    }
    return angles;
  }

  // A cosine or sine in units of 2^-15.
  static int16_t fixed(float x) {
    constexpr float kMagic = 12582912.0f; // 1.5 * 2^23: adding it rounds
    const float whole = x * 32768.0f + kMagic - kMagic;
    return static_cast<int16_t>(static_cast<int32_t>(whole < 32767.0f ? whole : 32767.0f));
  }
};

} // namespace commvq
