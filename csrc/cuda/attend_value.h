// One block of the second half of attention over codes: the weighted sum of the values of some
// tokens, from the scores that the first half left.
//
// The sum is V^T P^T on the tensor cores: values are A (dims x tokens), weights B (tokens x rows of
// queries). A thread decodes dims of one token, as it lies in memory; a transpose within the warp
// turns that into tokens of one dim, as an mma wants it. And as there, it does not matter which dim
// is which row of A, as long as the sums are put back in place.
#pragma once

#include "cuda/attend_page.h"

namespace commvq::gpu {

// Weights are up to 2^14 in half precision, so that those of the many far tokens keep their digits.
constexpr float kWeightBits = 14.0f, kWeightUnit = 1.0f / 16384.0f;

template <int kWords, int kTiles, int kWarps>
struct ValueBlock {
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kWidth = kSliceStep * kWords;
  static constexpr int kAllRows = kRows * kTiles;
  static constexpr int kPairs = 2 * kWords;

  struct Registers {
    Half2 token[2][kPairs], weight[kTiles][2];
    float sum[kTiles][kWords][4], total[kTiles];
    const uint8_t* codes[2]; // of two tokens, and their first
    uint32_t ahead[2];
  };
  using All = PerThread<Registers, kThreads>;

  const AttendArguments& a;
  const ValueShared& shared;
  int64_t unit, row, head, split, tile;
  Span span;
  int rows; // of queries that there are
  const float* scores;

  COMMVQ_HD static void run(
      const AttendArguments& a, int64_t split, int64_t local_unit, int64_t z, char* memory) {
    const int64_t unit = a.first_unit + local_unit;
    const ValueShared shared({memory}, kWords, kTiles, kWarps, a.values.stages, a.values.page);
    const int64_t tile = a.first_tile + z;
    const ValueBlock block = {
        a,
        shared,
        unit,
        unit / a.heads,
        unit % a.heads,
        split,
        tile,
        span_of(a, unit, split),
        rows_of(a, tile),
        a.scores + (local_unit * a.tiles + z) * a.stop * a.score_rows};
    if (block.span.begin < block.span.end) {
      block.run();
    }
  }

 private:
  COMMVQ_HD static int rows_of(const AttendArguments& a, int64_t tile) {
    const int64_t left = a.queries - tile * kAllRows;
    return static_cast<int>(left < kAllRows ? left : kAllRows);
  }
  // Where this block's results of the tile's first row are, counted in rows.
  COMMVQ_HD int64_t place() const {
    return (unit * a.splits + split) * a.queries + tile * kAllRows;
  }

  COMMVQ_HD void run() const {
    All registers;
    each_thread<kThreads>([&](int thread) {
      if (thread < kAllRows) {
        shared.peaks[thread] = thread < rows ? a.peaks[place() + thread] : 0.0f;
      }
    });
    const int pages = Page<kWords>::number(a.values);
    for (int index = 0; index < pages; ++index) {
      const Page<kWords> page(a.values, row, head, index);
      sync_block();
      page.template load<kThreads>(head, shared.page);
      each_warp<kWarps>([&](int warp) { add_tokens(page, warp, registers); });
      if (index == 0) {
        join_totals(registers);
      }
      join_sums(page, registers);
    }
  }

  COMMVQ_HD void add_tokens(const Page<kWords>& page, int warp, All& registers) const {
    Tiles<1, kWarps> tiles(span, warp);
    each_lane(warp, [&](int thread) {
      Registers& own = registers[thread];
      COMMVQ_UNROLL
      for (int n = 0; n < kTiles; ++n) {
        own.total[n] = 0.0f;
        COMMVQ_UNROLL
        for (int j = 0; j < 4 * kWords; ++j) {
          own.sum[n][j / 4][j % 4] = 0.0f;
        }
      }
      const int64_t start = tiles.start;
      for (int half = 0; half < 2; ++half) {
        own.codes[half] = page.codes_of(start + thread % kWarp / 4 + 8 * half, span.end);
        own.ahead[half] = page.four_codes(own.codes[half], 0);
      }
    });
    while (tiles.start < span.end) {
      const int64_t start = tiles.start;
      tiles.advance();
      const int64_t next = tiles.start;
      each_lane(warp, [&](int thread) {
        Registers& own = registers[thread];
        weigh(start, thread, own);
        const int token = thread % kWarp / 4;
        const uint8_t* const then[2] = {
            page.codes_of(next + token, span.end), page.codes_of(next + token + 8, span.end)};
        page.template decode<false>(shared.page, thread % 4, own.codes, then, own.ahead, own.token);
        own.codes[0] = then[0];
        own.codes[1] = then[1];
      });
      COMMVQ_UNROLL
      for (int j = 0; j < 2 * kPairs; ++j) {
        transpose(warp, [&](int thread) -> Half2& {
          return registers[thread].token[j / kPairs][j % kPairs];
        });
      }
      COMMVQ_UNROLL
      for (int m = 0; m < kWords; ++m) {
        COMMVQ_UNROLL
        for (int n = 0; n < kTiles; ++n) {
          mma(
              warp,
              [&](int thread) -> MmaA {
                auto& token = registers[thread].token;
                return {token[0][2 * m], token[0][2 * m + 1], token[1][2 * m], token[1][2 * m + 1]};
              },
              [&](int thread) -> MmaB {
                auto& weight = registers[thread].weight[n];
                return {weight[0], weight[1]};
              },
              [&](int thread) -> float* { return registers[thread].sum[n][m]; });
        }
      }
    }
  }

  // Thread 4 * g + t: the weights of tokens 2t, 2t + 1, 2t + 8 and 2t + 9 for row g of every 8.
  COMMVQ_HD void weigh(int64_t start, int thread, Registers& own) const {
    constexpr float kLog2E = 1.44269504f;
    const int row_step = static_cast<int>(a.score_rows), token = thread % 4 * 2;
    const int end = span.end - start < kTile ? static_cast<int>(span.end - start) : kTile;
    const int begin = span.begin > start ? static_cast<int>(span.begin - start) : 0;
    const float* place = scores + (start + token) * a.score_rows + thread % kWarp / 4;
    COMMVQ_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      const int r = n * kRows + thread % kWarp / 4;
      float weight[4];
      COMMVQ_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int beyond = j / 2 * 8 + j % 2;
        weight[j] = 0.0f;
        if (r < rows && token + beyond >= begin && token + beyond < end) {
          const float below = place[beyond * row_step + n * kRows] - shared.peaks[r];
          weight[j] = power_of_two(below * kLog2E + kWeightBits);
        }
        own.total[n] += weight[j];
      }
      own.weight[n][0] = half2_of(weight[0], weight[1]);
      own.weight[n][1] = half2_of(weight[2], weight[3]);
    }
  }

  COMMVQ_HD void join_totals(All& registers) const {
    each_warp<kWarps>([&](int warp) {
      for (int n = 0; n < kTiles; ++n) {
        PerThread<Shared, kThreads> total;
        each_lane(warp, [&](int thread) { total[thread] = {registers[thread].total[n]}; });
        warp_join<1 + 2>(
            warp,
            [&](int thread) -> Shared& { return total[thread]; },
            [](Shared x, Shared y) -> Shared { return {x.value + y.value}; });
        each_lane(warp, [&](int thread) {
          if (thread % 4 == 0) {
            const int r = n * kRows + thread % kWarp / 4;
            shared.joined[warp * kAllRows + r] = total[thread].value;
          }
        });
      }
    });
    sync_block();
    each_thread<kThreads>([&](int thread) {
      if (thread < rows) {
        float total = 0.0f;
        for (int warp = 0; warp < kWarps; ++warp) {
          total += shared.joined[warp * kAllRows + thread];
        }
        shared.totals[thread] = total;
        a.totals[place() + thread] = total * kWeightUnit;
      }
    });
  }

  // Warps add their sums one after the other: the order is always the same.
  COMMVQ_HD void join_sums(const Page<kWords>& page, All& registers) const {
    for (int turn = 0; turn < kWarps; ++turn) {
      each_warp<kWarps>([&](int warp) {
        if (warp != turn) {
          return;
        }
        each_lane(warp, [&](int thread) {
          COMMVQ_UNROLL
          for (int n = 0; n < kTiles; ++n) {
            COMMVQ_UNROLL
            for (int j = 0; j < 4 * kWords; ++j) {
              // Row g of the upper half of A is pair 2m of thread g / 2, of the lower half 2m + 1.
              const int g = thread % kWarp / 4, m = j / 4;
              const int d = 4 * kWords * (g / 2) + 4 * m + j % 4 / 2 * 2 + g % 2;
              const int r = n * kRows + thread % 4 * 2 + j % 2;
              float& sum = shared.sums[d * kAllRows + r];
              sum = registers[thread].sum[n][m][j % 4] + (turn == 0 ? 0.0f : sum);
            }
          }
        });
      });
      sync_block();
    }
    const float worth = shared.page.facts->unit * kWeightUnit;
    each_thread<kThreads>([&](int thread) {
      for (int i = thread; i < rows * page.width(); i += kThreads) {
        const int r = i / page.width(), d = i % page.width();
        float& sum = a.sums[(place() + r) * a.dim + page.dim() + d];
        const float missed = shared.page.facts->missed * shared.totals[r];
        const float value = (shared.sums[d * kAllRows + r] + missed) * worth;
        sum = page.begins_slice() ? value : sum + value;
      }
    });
  }
};

// Merges the splits of one row of queries of a unit by their peaks: dim `d` of its weighted sum,
// and with d == 0 its peak and total. Splits whose tokens are all hidden have a peak of -infinity.
COMMVQ_HD void merge_splits(
    const AttendArguments& a,
    int64_t unit,
    int64_t r,
    int64_t d,
    float* weighted,
    float* peaks,
    float* totals) {
  const auto place = [&](int64_t split) { return (unit * a.splits + split) * a.queries + r; };
  float peak = -infinity(), total = 0.0f, sum = 0.0f;
  for (int64_t split = 0; split < a.splits; ++split) {
    peak = larger(a.peaks[place(split)], peak);
  }
  for (int64_t split = 0; split < a.splits; ++split) {
    const float own = a.peaks[place(split)];
    if (own == -infinity()) {
      continue;
    }
    const float weight = expf(own - peak);
    total += weight * a.totals[place(split)];
    sum += weight * a.sums[place(split) * a.dim + d];
  }
  weighted[(unit * a.queries + r) * a.dim + d] = sum;
  if (d == 0) {
    peaks[unit * a.queries + r] = peak;
    totals[unit * a.queries + r] = total;
  }
}

} // namespace commvq::gpu
