// Tables of 2 c . c' for codewords of different stages: two ways to fill them, the same bits.
#pragma once

#include "common/buffer.h"
#include "common/share.h"
#include "cpu/additive_encode_unit.h"

#include <algorithm>
#include <cstdint>

namespace commvq {

// Every row of one stage, worked out beforehand by all threads and then shared by them. Tables of
// all stages at once would take stages^2 / 2 of these: 80 MB at 3 bits.
class StagePairs {
 public:
  explicit StagePairs(const EncodeUnit& unit)
      : unit_(unit),
        table_((unit.shape().stages - 1) * unit.shape().codewords * unit.shape().width()) {}

  // Works out the rows of `stage`, and forgets those of the stage before.
  void fill(int64_t stage) {
    const int64_t rows = unit_.shape().codewords, parts = (rows + kRowsAtOnce - 1) / kRowsAtOnce;
    share_out(stage * parts, [&](int64_t part) {
      const int64_t first = part % parts * kRowsAtOnce;
      fill(part / parts, stage, first, std::min(kRowsAtOnce, rows - first));
    });
  }

  // Points `rows` at the rows that beams with these codes need at the stage that was filled: the
  // earlier stages' of the first beam, then of the second, and so on.
  void find(const uint8_t* codes, int64_t beams, int64_t stage, const float** rows) const {
    const EncodeShape& shape = unit_.shape();
    for (int64_t beam = 0; beam < beams; ++beam, codes += shape.stages) {
      for (int64_t earlier = 0; earlier < stage; ++earlier) {
        const int64_t row = earlier * shape.codewords + codes[earlier];
        *rows++ = table_.data() + row * shape.width();
      }
    }
  }
  // Call it before reading the rows that were found for a stage.
  void complete(int64_t /*stage*/) const {}

 private:
  static constexpr int64_t kRowsAtOnce = 64;

  void fill(int64_t earlier, int64_t later, int64_t first, int64_t count) const {
    const EncodeShape& shape = unit_.shape();
    const Rows codewords = unit_.codewords(earlier, first);
    float* to = table_.data() + (earlier * shape.codewords + first) * shape.width();
    encode_kernels().products(codewords, count, unit_.book(later), 2.0f, nullptr, to);
  }

  const EncodeUnit& unit_;
  Buffer<float> table_;
};

// A row of one stage only once somebody asks for it. Belongs to one thread.
class PairsOnDemand {
 public:
  explicit PairsOnDemand(const EncodeUnit& unit)
      : unit_(unit),
        table_(capacity(unit.shape()) * unit.shape().width()),
        missing_(unit.shape(), capacity(unit.shape())),
        place_((unit.shape().stages - 1) * unit.shape().codewords) {}

  // The rows of another stage are forgotten.
  void find(const uint8_t* codes, int64_t beams, int64_t stage, const float** rows) {
    const EncodeShape& shape = unit_.shape();
    if (stage != stage_) {
      std::fill(place_.data(), place_.data() + stage * shape.codewords, int32_t{-1});
      filled_ = 0;
      stage_ = stage;
    }
    for (int64_t beam = 0; beam < beams; ++beam, codes += shape.stages) {
      for (int64_t earlier = 0; earlier < stage; ++earlier) {
        int32_t& place = place_[earlier * shape.codewords + codes[earlier]];
        if (place < 0) {
          place = static_cast<int32_t>(filled_ + added_);
          missing_.copy(added_++, unit_.codewords(earlier, codes[earlier]));
        }
        *rows++ = table_.data() + place * shape.width();
      }
    }
  }
  void complete(int64_t stage) {
    const EncodeShape& shape = unit_.shape();
    float* to = table_.data() + filled_ * shape.width();
    encode_kernels().products(missing_.from(0), added_, unit_.book(stage), 2.0f, nullptr, to);
    filled_ += added_;
    added_ = 0;
  }

 private:
  // Each token's beams can ask for one row of every earlier stage.
  static int64_t capacity(const EncodeShape& shape) {
    return (shape.stages - 1) * std::min(shape.codewords, shape.tokens * shape.beam);
  }

  const EncodeUnit& unit_;
  Buffer<float> table_;
  RoundedRows missing_;
  Buffer<int32_t> place_;
  int64_t stage_ = 0, filled_ = 0, added_ = 0; // rows worked out, and rows only promised
};

} // namespace commvq
