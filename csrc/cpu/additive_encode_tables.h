// Tables of 2 c . c' for codewords of different stages.
#pragma once

#include "common/buffer.h"
#include "common/share.h"
#include "cpu/additive_encode_unit.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace commvq {

// Of one stage at a time, worked out by all threads and then shared by them. Tables of all stages
// at once would take stages^2 / 2 of these: 40 MB at 3 bits.
class StagePairs {
 public:
  explicit StagePairs(const EncodeUnit& unit)
      : unit_(unit),
        table_((unit.shape().stages - 1) * unit.shape().codewords * unit.shape().width()) {}

  // Works out the table of `stage`, and forgets that of the stage before. It serves vectors that
  // are up to `far` from the sums of the stages before.
  void fill(int64_t stage, float far) {
    set_scale(stage, far);
    if (serves_) {
      const int64_t rows = unit_.shape().codewords, parts = (rows + kRowsAtOnce - 1) / kRowsAtOnce;
      share_out(stage * parts, [&](int64_t part) {
        const int64_t first = part % parts * kRowsAtOnce;
        fill(part / parts, stage, first, std::min(kRowsAtOnce, rows - first));
      });
    }
  }

  Table table() const { return {serves_ ? table_.data() : nullptr, scale_}; }

 private:
  static constexpr int64_t kRowsAtOnce = 64;

  // Sums may differ by as much again as half the square of `far`.
  void set_scale(int64_t stage, float far) {
    const float longest = unit_.stage(stage).longest;
    const float span = longest * longest + 4.0f * far * longest + 0.5f * far * far;
    scale_ = span / kSpan;
    float most = 0.0f;
    for (int64_t earlier = 0; earlier < stage; ++earlier) {
      most = std::max(most, 2.0f * unit_.stage(earlier).longest * longest / scale_);
    }
    serves_ = std::isfinite(scale_) && scale_ > 1e-30f && most < kMostRounded;
  }

  void fill(int64_t earlier, int64_t later, int64_t first, int64_t count) const {
    const EncodeShape& shape = unit_.shape();
    const Rows codewords = unit_.codewords(earlier, first);
    int16_t* to = table_.data() + (earlier * shape.codewords + first) * shape.width();
    encode_kernels().products(codewords, count, unit_.book(later), 2.0f, nullptr, scale_, to);
  }

  const EncodeUnit& unit_;
  Buffer<int16_t> table_;
  float scale_ = 0.0f;
  bool serves_ = false;
};

} // namespace commvq
