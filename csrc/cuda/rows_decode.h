// One block that decodes: a slice of the keys or values of some tokens of a unit, into tiles that
// attention of many rows reads (rows_plan.h). Keys are turned to their positions here, once for all
// queries, in float32.
#pragma once

#include "cuda/rows_plan.h"

namespace commvq::gpu {

template <int kWords, bool kKeys>
struct DecodeBlock {
  static constexpr int kThreads = kDecodeWarps * kWarp;
  static constexpr int kWidth = kSliceStep * kWords;
  static constexpr int kPairs = 2 * kWords;

  struct Registers {
    Half2 token[2][kPairs];
    const uint8_t* codes[2]; // of two tokens, and their first
    uint32_t ahead[2];
  };
  using All = PerThread<Registers, kThreads>;

  const RowsArguments& m;
  const AttendSide& side;
  const DecodeShared& shared;
  int64_t row, head, begin, end;
  int slice; // of all sub-vectors
  Half2* out;

  COMMVQ_HD static void run(
      const RowsArguments& m, int64_t split, int64_t local_unit, int slice, char* memory) {
    const AttendSide& side = kKeys ? m.a.keys : m.a.values;
    const DecodeShared shared({memory}, kWords, 0, 0, side.stages, side.page);
    const int64_t unit = m.a.first_unit + local_unit, begin = m.begin + split * m.decode_tokens;
    const int64_t end = begin + m.decode_tokens, last = m.decoded_end();
    const int64_t width = kKeys ? m.key_width : m.value_width;
    const DecodeBlock block = {
        m,
        side,
        shared,
        unit / m.a.heads,
        unit % m.a.heads,
        begin,
        end < last ? end : last,
        slice,
        (kKeys ? m.keys : m.values) + local_unit * m.room * (width / 2)};
    block.run();
  }

 private:
  COMMVQ_HD void run() const {
    All registers;
    const int pages = Page<kWords>::pages(side);
    for (int index = 0; index < pages; ++index) {
      const Page<kWords> page(side, row, head, slice * pages + index);
      sync_block(); // everyone is done with the page before
      page.template load<kThreads>(head, shared.page);
      if (kKeys && index == 0) {
        load_steps(page);
        sync_block();
      }
      each_warp<kDecodeWarps>([&](int warp) { decode_tokens(page, warp, registers); });
    }
  }

  COMMVQ_HD void load_steps(const Page<kWords>& page) const {
    each_thread<kThreads>([&](int thread) {
      for (int i = thread; i < kTurnBlock * kWidth / 2; i += kThreads) {
        const int token = i / (kWidth / 2), at = i % (kWidth / 2);
        const int64_t pair = page.dim() / 2 + at;
        const bool turns = 2 * at < page.width() && pair < m.a.pairs;
        const float* from = m.a.steps + token * 2 * m.a.pairs + pair;
        shared.steps[2 * i] = turns ? from[0] : 1.0f;
        shared.steps[2 * i + 1] = turns ? from[m.a.pairs] : 0.0f;
      }
    });
  }

  COMMVQ_HD void decode_tokens(const Page<kWords>& page, int warp, All& registers) const {
    Tiles<1, kDecodeWarps> tiles({begin, end}, warp);
    const int64_t stop = m.a.stop;
    each_lane(warp, [&](int thread) {
      Registers& own = registers[thread];
      for (int half = 0; half < 2; ++half) {
        own.codes[half] = page.codes_of(tiles.start + thread % kWarp / 4 + 8 * half, stop);
        own.ahead[half] = page.four_codes(own.codes[half], 0);
      }
    });
    while (tiles.start < end) {
      const int64_t start = tiles.start;
      tiles.advance();
      each_lane(warp, [&](int thread) {
        Registers& own = registers[thread];
        const int64_t next = tiles.start + thread % kWarp / 4;
        const uint8_t* const then[2] = {page.codes_of(next, stop), page.codes_of(next + 8, stop)};
        page.template decode<kKeys>(shared.page, thread % 4, own.codes, then, own.ahead, own.token);
        own.codes[0] = then[0];
        own.codes[1] = then[1];
      });
      if (!kKeys) {
        COMMVQ_UNROLL
        for (int j = 0; j < 2 * kPairs; ++j) {
          transpose(warp, [&](int thread) -> Half2& {
            return registers[thread].token[j / kPairs][j % kPairs];
          });
        }
      }
      each_lane(warp, [&](int thread) {
        if (kKeys) {
          keep_keys(page, start, thread, registers[thread]);
        } else {
          keep_values(page, start, thread, registers[thread]);
        }
      });
    }
  }

  // Thread 4 * g + t has part t of tokens g and g + 8.
  COMMVQ_HD void keep_keys(
      const Page<kWords>& page, int64_t start, int thread, const Registers& own) const {
    const AttendArguments& a = m.a;
    const int64_t block =
        start / kTurnBlock < a.turn_blocks ? start / kTurnBlock : a.turn_blocks - 1;
    const float* turns =
        a.turns + ((a.turn_rows == 1 ? 0 : row) * a.turn_blocks + block) * 2 * a.pairs;
    COMMVQ_UNROLL
    for (int j = 0; j < kPairs; ++j) {
      const int at = thread % 4 * 2 * kPairs + 2 * j;
      if (at >= page.width()) {
        continue;
      }
      const int64_t d = page.dim() + at, pair = d / 2;
      const bool turning = pair < a.pairs;
      const float c = turning ? turns[pair] : 1.0f, s = turning ? turns[a.pairs + pair] : 0.0f;
      COMMVQ_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int64_t token = start + thread % kWarp / 4 + 8 * half;
        const float* step = shared.steps + token % kTurnBlock * kWidth + at;
        const float re = c * step[0] - s * step[1], im = c * step[1] + s * step[0];
        const float x = low(own.token[half][j]), y = high(own.token[half][j]);
        keep(page, key_place(token - m.begin, d, m.key_width), x * re - y * im, x * im + y * re);
      }
    }
  }

  // Row g of a transposed matrix j is dim g % 2 of pair j of thread g / 2.
  COMMVQ_HD void keep_values(
      const Page<kWords>& page, int64_t start, int thread, const Registers& own) const {
    const int g = thread % kWarp / 4;
    const float missed = shared.page.facts->missed;
    COMMVQ_UNROLL
    for (int j = 0; j < kPairs; ++j) {
      const int at = g / 2 * 2 * kPairs + 2 * j + g % 2;
      if (at >= page.width()) {
        continue;
      }
      COMMVQ_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int64_t token = start - m.begin + 8 * half + thread % 4 * 2;
        const Half2 both = own.token[half][j];
        const int64_t place = value_place(token, page.dim() + at, m.value_width);
        keep(page, place, low(both) + missed, high(both) + missed);
      }
    }
  }

  // Stores two numbers, or adds them to what the thread stored on an earlier page.
  COMMVQ_HD void keep(const Page<kWords>& page, int64_t place, float x, float y) const {
    Half2& kept = out[place / 2];
    if (!page.begins_slice()) {
      x += low(kept);
      y += high(kept);
    }
    kept = half2_of(x, y);
  }
};

} // namespace commvq::gpu
