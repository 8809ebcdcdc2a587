// One block of attention of many rows of queries over decoded tokens: up to 128 rows of a unit, a
// split of a part's tokens, and a slice of the values' dims.
//
// A warp has 16 rows. Queries are A of mma (rows x dims) and keys B; the weights of 64 tokens, kept
// in the registers that their scores were in, are A of the second mma (rows x tokens) and values B.
// Softmax is a running one: sums shrink when a row's peak rises. What a part leaves, the next
// one takes up.
#pragma once

#include "cuda/attend_value.h"
#include "cuda/rows_plan.h"

namespace commvq::gpu {

template <int kColumns, int kWarps>
struct RowsBlock {
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kBlockRows = kWarps * kWarpRows;
  static constexpr int kTiles = kBlockTokens / 8; // of 8 tokens

  struct Registers {
    float score[kTiles][4], sum[kColumns][4];
    float peak[2], total[2]; // of rows g and g + 8; a thread's part of the total
    FourHalf2 query[2], other;
    MmaA weight[kTiles / 2];
  };
  using All = PerThread<Registers, kThreads>;
  using Copies = AsyncCopies<kThreads>;

  const RowsArguments& m;
  const AttendArguments& a;
  const RowsShared& shared;
  int64_t unit, row, head, split, tile;
  int slice, rows; // of queries that there are
  Span span;
  const Half2 *keys, *values; // of the unit

  COMMVQ_HD static void run(
      const RowsArguments& m, int64_t index, int64_t local_unit, int64_t split, char* memory) {
    const AttendArguments& a = m.a;
    const RowsShape shape = {kWarps, m.buffers, kColumns, m.slices};
    const RowsShared shared({memory}, shape, m.key_width, a.keys.subs, a.values.subs);
    const int64_t unit = a.first_unit + local_unit, tile = index / m.slices;
    const int64_t left = a.queries - tile * kBlockRows;
    const int64_t first = a.first[unit / a.heads], from = m.begin + split * a.split_tokens;
    const int64_t to = from + a.split_tokens;
    const RowsBlock block = {
        m,
        a,
        shared,
        unit,
        unit / a.heads,
        unit % a.heads,
        split,
        tile,
        static_cast<int>(index % m.slices),
        static_cast<int>(left < kBlockRows ? left : kBlockRows),
        {first > from ? first : from, to < m.end ? to : m.end},
        m.keys + local_unit * m.room * (m.key_width / 2),
        m.values + local_unit * m.room * (m.value_width / 2)};
    block.run();
  }

 private:
  COMMVQ_HD void run() const {
    All registers;
    Copies copies;
    load_units();
    sync_block();
    each_warp<kWarps>([&](int warp) {
      load_queries(warp);
      each_lane(warp, [&](int thread) { begin_rows(thread, registers[thread]); });
    });
    const int64_t first = span.begin / kBlockTokens * kBlockTokens;
    int buffer = 0;
    start_copies(first, buffer, copies);
    for (int64_t start = first; start < span.end; start += kBlockTokens) {
      const int next = m.buffers == 2 ? 1 - buffer : 0;
      if (m.buffers == 2) {
        start_copies(start + kBlockTokens, next, copies);
      }
      each_thread<kThreads>([&](int thread) {
        m.buffers == 2 ? copies.template wait<1>(thread) : copies.template wait<0>(thread);
      });
      sync_block();
      each_warp<kWarps>([&](int warp) {
        score_tokens(warp, buffer, registers);
        each_lane(warp, [&](int thread) { finish_scores(start, thread, registers[thread]); });
        raise_peaks(warp, registers);
        add_values(warp, buffer, registers);
      });
      sync_block();
      if (m.buffers == 1) {
        start_copies(start + kBlockTokens, next, copies);
      }
      buffer = next;
    }
    each_thread<kThreads>([&](int thread) { copies.template wait<0>(thread); });
    each_warp<kWarps>([&](int warp) { keep_rows(warp, registers); });
  }

  COMMVQ_HD void load_units() const {
    each_thread<kThreads>([&](int thread) {
      for (int sub = thread; sub < a.keys.subs; sub += kThreads) {
        shared.units[sub] = unit_of(a.keys, head, sub);
      }
      for (int sub = thread; sub < a.values.subs; sub += kThreads) {
        shared.worths[sub] = unit_of(a.values, head, sub) * kWeightUnit;
      }
    });
  }

  // Of the warp's rows, times what a unit of a decoded key is worth. The largest number of a row is
  // divided out, so that half precision neither over- nor underflows.
  COMMVQ_HD void load_queries(int warp) const {
    for (int r = warp * kWarpRows; r < (warp + 1) * kWarpRows; ++r) {
      const float* own = a.query + (unit * a.queries + tile * kBlockRows + r) * a.dim;
      const auto number = [&](int d) {
        return r < rows && d < a.dim ? own[d] * shared.units[d / a.keys.sub_dim] : 0.0f;
      };
      PerThread<Shared, kThreads> most;
      each_lane(warp, [&](int thread) {
        most[thread] = {0.0f};
        for (int d = thread % kWarp; d < a.dim; d += kWarp) {
          const float value = number(d);
          most[thread].value = larger(value < 0.0f ? -value : value, most[thread].value);
        }
      });
      warp_join<31>(
          warp,
          [&](int thread) -> Shared& { return most[thread]; },
          [](Shared x, Shared y) -> Shared { return {larger(x.value, y.value)}; });
      each_lane(warp, [&](int thread) {
        const float size = most[thread].value > 0.0f ? most[thread].value : 1.0f;
        for (int d = thread % kWarp * 2; d < m.key_width; d += 2 * kWarp) {
          const int64_t place = (r / 8 * (m.key_width / kDimStep) + d / kDimStep) * (8 * kDimStep) +
                                r % 8 * kDimStep + d % kDimStep;
          shared.query[place / 2] = half2_of(number(d) / size, number(d + 1) / size);
        }
        if (thread % kWarp == 0) {
          shared.sizes[r] = size;
        }
      });
    }
    sync_warp();
  }

  // Where results of the block's first row are, counted in rows.
  COMMVQ_HD int64_t place() const {
    return (unit * a.splits + split) * a.queries + tile * kBlockRows;
  }
  COMMVQ_HD static int row_of(int thread, int half) {
    return thread / kWarp * kWarpRows + thread % kWarp / 4 + 8 * half;
  }
  COMMVQ_HD int dim_of(int column, int thread) const {
    return (slice * kColumns + column) * 8 + thread % 4 * 2;
  }

  COMMVQ_HD void begin_rows(int thread, Registers& own) const {
    COMMVQ_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int r = row_of(thread, half);
      const bool known = !m.first_part() && r < rows;
      const int64_t at = place() + r;
      own.peak[half] = known ? a.peaks[slice * m.slice_stride + at] : -infinity();
      // One of a row's four threads keeps what was there before.
      own.total[half] = known && thread % 4 == 0 ? a.totals[slice * m.slice_stride + at] : 0.0f;
      COMMVQ_UNROLL
      for (int column = 0; column < kColumns; ++column) {
        COMMVQ_UNROLL
        for (int j = 0; j < 2; ++j) {
          const int d = dim_of(column, thread) + j;
          own.sum[column][2 * half + j] = known && d < a.dim ? a.sums[at * a.dim + d] : 0.0f;
        }
      }
    }
  }

  // Starts copying 64 tokens into a buffer; nothing beyond the span's end.
  COMMVQ_HD void start_copies(int64_t start, int buffer, Copies& copies) const {
    const int64_t key_size = kBlockTokens * m.key_width / 8, group_size = kColumns * 32;
    const FourHalf2* from =
        reinterpret_cast<const FourHalf2*>(keys) + (start - m.begin) * (m.key_width / 8);
    FourHalf2* to = reinterpret_cast<FourHalf2*>(shared.keys) + buffer * key_size;
    const FourHalf2* value_from = reinterpret_cast<const FourHalf2*>(values) +
                                  (start - m.begin) * (m.value_width / 8) + slice * group_size;
    FourHalf2* value_to = reinterpret_cast<FourHalf2*>(shared.values) + buffer * 2 * group_size;
    each_thread<kThreads>([&](int thread) {
      if (start < span.end) {
        for (int64_t i = thread; i < key_size; i += kThreads) {
          copies.start(thread, to + i, from + i);
        }
        for (int64_t i = thread; i < 2 * group_size; i += kThreads) {
          // 32 tokens of the slice, then the next 32.
          const int64_t group = i / group_size, skipped = group * (m.value_width * 4 - group_size);
          copies.start(thread, value_to + i, value_from + i + skipped);
        }
      }
      copies.close(thread);
    });
  }

  COMMVQ_HD void score_tokens(int warp, int buffer, All& registers) const {
    const int64_t steps = m.key_width / kDimStep;
    each_lane(warp, [&](int thread) {
      COMMVQ_UNROLL
      for (int j = 0; j < 4 * kTiles; ++j) {
        registers[thread].score[j / 4][j % 4] = 0.0f;
      }
    });
    const FourHalf2* query =
        reinterpret_cast<const FourHalf2*>(shared.query) + warp * 2 * steps * kWarp;
    const FourHalf2* key =
        reinterpret_cast<const FourHalf2*>(shared.keys) + buffer * kTiles * steps * kWarp;
    for (int64_t step = 0; step < steps; ++step) {
      each_lane(warp, [&](int thread) {
        registers[thread].query[0] = query[step * kWarp + thread % kWarp];
        registers[thread].query[1] = query[(steps + step) * kWarp + thread % kWarp];
      });
      COMMVQ_UNROLL
      for (int n = 0; n < kTiles; ++n) {
        each_lane(warp, [&](int thread) {
          registers[thread].other = key[(n * steps + step) * kWarp + thread % kWarp];
        });
        COMMVQ_UNROLL
        for (int half = 0; half < 2; ++half) {
          mma(
              warp,
              [&](int thread) -> MmaA {
                auto& query = registers[thread].query;
                return {
                    query[0].part[2 * half],
                    query[1].part[2 * half],
                    query[0].part[2 * half + 1],
                    query[1].part[2 * half + 1]};
              },
              [&](int thread) -> MmaB {
                auto& key = registers[thread].other;
                return {key.part[2 * half], key.part[2 * half + 1]};
              },
              [&](int thread) -> float* { return registers[thread].score[n]; });
        }
      }
    }
  }

  // Caps scores, which are then in their own units, and hides tokens outside the span.
  COMMVQ_HD void finish_scores(int64_t start, int thread, Registers& own) const {
    if (a.softcap > 0.0f) {
      COMMVQ_UNROLL
      for (int j = 0; j < 4 * kTiles; ++j) {
        float& score = own.score[j / 4][j % 4];
        const float size = shared.sizes[row_of(thread, j % 4 / 2)];
        score = a.softcap * tanhf(score * size / a.softcap);
      }
    }
    if (start >= span.begin && start + kBlockTokens <= span.end) {
      return;
    }
    COMMVQ_UNROLL
    for (int j = 0; j < 4 * kTiles; ++j) {
      const int tile_of_group = j / 4 % 4, group = j / 16;
      const int64_t token = start + 32 * group + token_of_score(tile_of_group, thread % 4, j % 2);
      if (token < span.begin || token >= span.end) {
        own.score[j / 4][j % 4] = -infinity();
      }
    }
  }

  // What a score's unit is worth.
  COMMVQ_HD float worth_of(int thread, int half) const {
    return a.softcap > 0.0f ? 1.0f : shared.sizes[row_of(thread, half)];
  }

  // Scores become weights of up to 2^14 below their row's peak.
  COMMVQ_HD void raise_peaks(int warp, All& registers) const {
    constexpr float kLog2E = 1.44269504f;
    PerThread<Shared, kThreads> most[2];
    each_lane(warp, [&](int thread) {
      Registers& own = registers[thread];
      COMMVQ_UNROLL
      for (int half = 0; half < 2; ++half) {
        float peak = own.peak[half];
        COMMVQ_UNROLL
        for (int j = 0; j < 2 * kTiles; ++j) {
          peak = larger(own.score[j / 2][2 * half + j % 2], peak);
        }
        most[half][thread] = {peak};
      }
    });
    COMMVQ_UNROLL
    for (int half = 0; half < 2; ++half) {
      warp_join<1 + 2>(
          warp,
          [&](int thread) -> Shared& { return most[half][thread]; },
          [](Shared x, Shared y) -> Shared { return {larger(x.value, y.value)}; });
    }
    each_lane(warp, [&](int thread) {
      Registers& own = registers[thread];
      COMMVQ_UNROLL
      for (int half = 0; half < 2; ++half) {
        const float peak = most[half][thread].value, scale = worth_of(thread, half) * kLog2E;
        const float safe = peak == -infinity() ? 0.0f : peak;
        const float factor = power_of_two((own.peak[half] - safe) * scale);
        const float offset = kWeightBits - safe * scale;
        own.peak[half] = peak;
        float total = own.total[half] * factor;
        COMMVQ_UNROLL
        for (int j = 0; j < 2 * kTiles; ++j) {
          float& score = own.score[j / 2][2 * half + j % 2];
          score = power_of_two(score * scale + offset);
          total += score;
        }
        own.total[half] = total;
        COMMVQ_UNROLL
        for (int j = 0; j < 2 * kColumns; ++j) {
          own.sum[j / 2][2 * half + j % 2] *= factor;
        }
      }
      COMMVQ_UNROLL
      for (int n = 0; n < kTiles; ++n) {
        const float* weight = own.score[n];
        own.weight[n / 2].part[n % 2 * 2] = half2_of(weight[0], weight[1]);
        own.weight[n / 2].part[n % 2 * 2 + 1] = half2_of(weight[2], weight[3]);
      }
    });
  }

  COMMVQ_HD void add_values(int warp, int buffer, All& registers) const {
    const FourHalf2* value =
        reinterpret_cast<const FourHalf2*>(shared.values) + buffer * 2 * kColumns * kWarp;
    COMMVQ_UNROLL
    for (int column = 0; column < kColumns; ++column) {
      COMMVQ_UNROLL
      for (int group = 0; group < 2; ++group) {
        each_lane(warp, [&](int thread) {
          registers[thread].other = value[(group * kColumns + column) * kWarp + thread % kWarp];
        });
        COMMVQ_UNROLL
        for (int half = 0; half < 2; ++half) {
          mma(
              warp,
              [&](int thread) -> MmaA { return registers[thread].weight[2 * group + half]; },
              [&](int thread) -> MmaB {
                auto& value = registers[thread].other;
                return {value.part[2 * half], value.part[2 * half + 1]};
              },
              [&](int thread) -> float* { return registers[thread].sum[column]; });
        }
      }
    }
  }

  // After the last part, in the units of scores and values.
  COMMVQ_HD void keep_rows(int warp, All& registers) const {
    PerThread<Shared, kThreads> total[2];
    COMMVQ_UNROLL
    for (int half = 0; half < 2; ++half) {
      each_lane(warp, [&](int thread) { total[half][thread] = {registers[thread].total[half]}; });
      warp_join<1 + 2>(
          warp,
          [&](int thread) -> Shared& { return total[half][thread]; },
          [](Shared x, Shared y) -> Shared { return {x.value + y.value}; });
    }
    const bool last = m.last_part();
    each_lane(warp, [&](int thread) {
      const Registers& own = registers[thread];
      COMMVQ_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int r = row_of(thread, half);
        if (r >= rows) {
          continue;
        }
        const int64_t at = place() + r, of_slice = slice * m.slice_stride + at;
        if (thread % 4 == 0) {
          a.peaks[of_slice] = own.peak[half] * (last ? worth_of(thread, half) : 1.0f);
          a.totals[of_slice] = total[half][thread].value * (last ? kWeightUnit : 1.0f);
        }
        COMMVQ_UNROLL
        for (int column = 0; column < kColumns; ++column) {
          COMMVQ_UNROLL
          for (int j = 0; j < 2; ++j) {
            const int d = dim_of(column, thread) + j;
            if (d < a.dim) {
              const float worth = last ? shared.worths[d / a.values.sub_dim] : 1.0f;
              a.sums[at * a.dim + d] = own.sum[column][2 * half + j] * worth;
            }
          }
        }
      }
    });
  }
};

} // namespace commvq::gpu
