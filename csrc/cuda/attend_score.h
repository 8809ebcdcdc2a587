// One block of the first half of attention over codes: the scores of some tokens of a row and head
// for up to 8 * kTiles rows of queries, and the largest score of each row.
//
// A warp decodes 16 tokens from codewords in shared memory, turns them by their places in their
// block of 32, and multiplies them with queries that are turned back by the block's start, on the
// tensor cores: keys are A (tokens x dims), queries B. Which dim is which of an mma's 16 does not
// matter as long as keys and queries agree, so a thread takes dims that lie side by side.
#pragma once

#include "cuda/attend_page.h"

namespace commvq::gpu {

template <int kWords, int kTiles, int kWarps>
struct ScoreBlock {
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kWidth = kSliceStep * kWords;
  static constexpr int kAllRows = kRows * kTiles;
  static constexpr int kRun = kTurnBlock / kTile; // tiles that share a turned query
  static constexpr int kPairs = 2 * kWords;       // that a thread holds of a slice

  struct Registers {
    Half2 token[2][kPairs], query[kTiles][kPairs];
    float score[kTiles][4], peak[kTiles][2];
    const uint8_t* codes[2]; // of two tokens, and their first
    uint32_t ahead[2];
  };
  using All = PerThread<Registers, kThreads>;

  const AttendArguments& a;
  const ScoreShared& shared;
  int64_t unit, row, head, split, tile;
  Span span;
  int rows;      // of queries that there are
  float* scores; // of the unit and tile

  COMMVQ_HD static void run(
      const AttendArguments& a, int64_t split, int64_t local_unit, int64_t z, char* memory) {
    const int64_t unit = a.first_unit + local_unit;
    const ScoreShared shared({memory}, kWords, kTiles, kWarps, a.keys.stages, a.keys.page);
    const int64_t tile = a.first_tile + z;
    const ScoreBlock block = {
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
    block.run();
  }

 private:
  COMMVQ_HD static int rows_of(const AttendArguments& a, int64_t tile) {
    const int64_t left = a.queries - tile * kAllRows;
    return static_cast<int>(left < kAllRows ? left : kAllRows);
  }

  COMMVQ_HD void run() const {
    All registers;
    each_thread<kThreads>([&](int thread) {
      for (int n = 0; n < kTiles; ++n) {
        registers[thread].peak[n][0] = registers[thread].peak[n][1] = -infinity();
      }
    });
    const int pages = span.begin < span.end ? Page<kWords>::number(a.keys) : 0;
    for (int index = 0; index < pages; ++index) {
      const Page<kWords> page(a.keys, row, head, index);
      sync_block(); // everyone is done with the page before
      page.template load<kThreads>(head, shared.page);
      if (page.begins_slice()) {
        load_queries(page);
        sync_block();
        size_queries();
        sync_block();
      }
      each_warp<kWarps>(
          [&](int warp) { score_tokens(page, warp, index == 0, index == pages - 1, registers); });
    }
    join_peaks(registers);
  }

  // The slice of the queries, times what a unit of its codewords is worth, and of the small turns.
  COMMVQ_HD void load_queries(const Page<kWords>& page) const {
    const float* own = a.query + (unit * a.queries + tile * kAllRows) * a.dim;
    each_thread<kThreads>([&](int thread) {
      for (int i = thread; i < kAllRows * kWidth; i += kThreads) {
        const int r = i / kWidth, d = i % kWidth;
        const bool real = r < rows && d < page.width();
        shared.query[i] = real ? own[r * a.dim + page.dim() + d] * shared.page.facts->unit : 0.0f;
      }
      for (int i = thread; i < kTurnBlock * kWidth / 2; i += kThreads) {
        const int token = i / (kWidth / 2), d = i % (kWidth / 2) * 2;
        const int64_t dim = page.dim() + d;
        const float* steps = a.steps + token * 2 * a.pairs + dim / 2;
        const bool turns = d < page.width() && dim / 2 < a.pairs;
        shared.steps[i] = turns ? half2_of(steps[0], steps[a.pairs]) : half2_of(1.0f, 0.0f);
      }
    });
  }

  // The largest number of a row is divided out, so that half precision neither over- nor
  // underflows.
  COMMVQ_HD void size_queries() const {
    each_thread<kThreads>([&](int thread) {
      if (thread < kAllRows) {
        float most = 0.0f;
        for (int d = 0; d < kWidth; ++d) {
          const float value = shared.query[thread * kWidth + d];
          most = larger(value < 0.0f ? -value : value, most);
        }
        shared.sizes[thread] = most > 0.0f ? most : 1.0f;
      }
    });
  }

  // Thread 4 * g + t takes part t of tokens g and g + 8, and of query row g of every 8.
  COMMVQ_HD void score_tokens(
      const Page<kWords>& page, int warp, bool first_page, bool last_page, All& registers) const {
    Tiles<kRun, kWarps> tiles(span, warp);
    each_lane(warp, [&](int thread) {
      Registers& own = registers[thread];
      const int64_t start = tiles.start;
      for (int half = 0; half < 2; ++half) {
        own.codes[half] = page.codes_of(start + token_of(thread) + 8 * half, span.end);
        own.ahead[half] = page.four_codes(own.codes[half], 0);
      }
    });
    while (tiles.start < span.end) {
      const int64_t start = tiles.start;
      const bool new_run = tiles.place == 0;
      tiles.advance();
      const int64_t next = tiles.start;
      if (new_run) {
        each_lane(warp, [&](int thread) {
          turn_queries(page, start / kTurnBlock, thread, registers[thread]);
        });
      }
      each_lane(warp, [&](int thread) {
        Registers& own = registers[thread];
        const uint8_t* const then[2] = {
            page.codes_of(next + token_of(thread), span.end),
            page.codes_of(next + token_of(thread) + 8, span.end)};
        page.template decode<true>(shared.page, thread % 4, own.codes, then, own.ahead, own.token);
        own.codes[0] = then[0];
        own.codes[1] = then[1];
        turn_tokens(static_cast<int>(start % kTurnBlock), thread, own);
        COMMVQ_UNROLL
        for (int n = 0; n < kTiles; ++n) {
          COMMVQ_UNROLL
          for (int j = 0; j < 4; ++j) {
            own.score[n][j] = 0.0f;
          }
        }
      });
      COMMVQ_UNROLL
      for (int n = 0; n < kTiles; ++n) {
        COMMVQ_UNROLL
        for (int k = 0; k < kWords; ++k) {
          mma(
              warp,
              [&](int thread) -> MmaA {
                auto& token = registers[thread].token;
                return {token[0][2 * k], token[1][2 * k], token[0][2 * k + 1], token[1][2 * k + 1]};
              },
              [&](int thread) -> MmaB {
                auto& query = registers[thread].query[n];
                return {query[2 * k], query[2 * k + 1]};
              },
              [&](int thread) -> float* { return registers[thread].score[n]; });
        }
      }
      each_lane(warp, [&](int thread) {
        keep_scores(start, thread, first_page, last_page, registers[thread]);
      });
    }
  }

  // Of the first of a thread's two tokens of a tile.
  COMMVQ_HD static int token_of(int thread) { return thread % kWarp / 4; }

  // q . R(m + d) k = R(-m) q . R(d) k
  COMMVQ_HD void turn_queries(
      const Page<kWords>& page, int64_t block, int thread, Registers& own) const {
    const float* turns =
        a.turns + ((a.turn_rows == 1 ? 0 : row) * a.turn_blocks + block) * 2 * a.pairs;
    COMMVQ_UNROLL
    for (int j = 0; j < kPairs; ++j) {
      const int d = thread % 4 * 2 * kPairs + 2 * j;
      const int64_t pair = (page.dim() + d) / 2;
      const bool turning = pair < a.pairs;
      const float c = turning ? turns[pair] : 1.0f, s = turning ? turns[a.pairs + pair] : 0.0f;
      COMMVQ_UNROLL
      for (int n = 0; n < kTiles; ++n) {
        const int r = n * kRows + thread % kWarp / 4;
        const float* both = shared.query + r * kWidth + d;
        const float size = 1.0f / shared.sizes[r], re = both[0] * size, im = both[1] * size;
        own.query[n][j] = half2_of(re * c + im * s, im * c - re * s);
      }
    }
  }

  COMMVQ_HD void turn_tokens(int offset, int thread, Registers& own) const {
    const int place = offset + thread % kWarp / 4;
    const Half2* steps = shared.steps + place * (kWidth / 2) + thread % 4 * kPairs;
    COMMVQ_UNROLL
    for (int half = 0; half < 2; ++half) {
      COMMVQ_UNROLL
      for (int j = 0; j < kPairs; ++j) {
        own.token[half][j] = rotated(own.token[half][j], steps[half * 8 * (kWidth / 2) + j]);
      }
    }
  }

  // The thread that wrote a score is the one that adds to it on later pages.
  COMMVQ_HD void keep_scores(
      int64_t start, int thread, bool first_page, bool last_page, Registers& own) const {
    const int row_step = static_cast<int>(a.score_rows), token = token_of(thread);
    const int end = span.end - start < kTile ? static_cast<int>(span.end - start) : kTile;
    const int begin = span.begin > start ? static_cast<int>(span.begin - start) : 0;
    float* place = scores + (start + token) * a.score_rows + thread % 4 * 2;
    COMMVQ_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      COMMVQ_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int r = n * kRows + thread % 4 * 2 + j % 2;
        if (token + j / 2 * 8 >= end || r >= rows) {
          continue;
        }
        float& kept = place[j / 2 * 8 * row_step + n * kRows + j % 2];
        float score = own.score[n][j] * shared.sizes[r];
        if (!first_page) {
          score += kept;
        }
        if (last_page) {
          score = a.softcap > 0.0f ? a.softcap * tanhf(score / a.softcap) : score;
          if (token + j / 2 * 8 >= begin) {
            own.peak[n][j % 2] = larger(score, own.peak[n][j % 2]);
          }
        }
        kept = score;
      }
    }
  }

  COMMVQ_HD void join_peaks(All& registers) const {
    each_warp<kWarps>([&](int warp) {
      for (int n = 0; n < kTiles; ++n) {
        for (int j = 0; j < 2; ++j) {
          PerThread<Shared, kThreads> peak;
          each_lane(warp, [&](int thread) { peak[thread] = {registers[thread].peak[n][j]}; });
          warp_join<4 + 8 + 16>(
              warp,
              [&](int thread) -> Shared& { return peak[thread]; },
              [](Shared x, Shared y) -> Shared { return {larger(x.value, y.value)}; });
          each_lane(warp, [&](int thread) {
            if (thread % kWarp < 4) {
              shared.joined[warp * kAllRows + n * kRows + thread % 4 * 2 + j] = peak[thread].value;
            }
          });
        }
      }
    });
    sync_block();
    each_thread<kThreads>([&](int thread) {
      if (thread < rows) {
        float peak = -infinity();
        for (int warp = 0; warp < kWarps; ++warp) {
          peak = larger(shared.joined[warp * kAllRows + thread], peak);
        }
        const int64_t place = (unit * a.splits + split) * a.queries + tile * kAllRows + thread;
        a.peaks[place] = peak;
      }
    });
  }
};

} // namespace commvq::gpu
