// A page of a codebook in shared memory, and how a warp decodes sixteen tokens from it.
#pragma once

#include "cuda/attend_plan.h"

namespace commvq::gpu {

constexpr float kUnit = 512.0f; // 2^24 / 2^15: of a page's sums, times the largest scale

struct alignas(16) SixteenBytes {
  uint32_t word[4];
};

// The tokens of a row and head that a block works on.
struct Span {
  int64_t begin, end;
};

COMMVQ_HD Span span_of(const AttendArguments& a, int64_t unit, int64_t split) {
  const int64_t first = a.first[unit / a.heads];
  int64_t begin = split * a.split_tokens, end = begin + a.split_tokens;
  begin = first > begin ? first : begin;
  end = end < a.stop ? end : a.stop;
  return {begin, end};
}

// What 1 of a decoded number of a sub-vector is worth.
COMMVQ_HD float unit_of(const AttendSide& side, int64_t head, int64_t sub) {
  const int64_t from = (head * side.subs + sub) * side.stages;
  float most = 0.0f;
  for (int64_t i = from; i < from + side.stages; ++i) {
    const float scale = side.gains == nullptr ? side.scales[i] : static_cast<float>(side.gains[i]);
    most = larger(scale < 0.0f ? -scale : scale, most);
  }
  return kUnit * (most > 0.0f ? most : 1.0f);
}

// The tiles of a warp: warps take runs of kRun tiles in turn.
template <int kRun, int kWarps>
struct Tiles {
  int64_t start; // the first token
  int place = 0; // of the tile in its run

  COMMVQ_HD Tiles(const Span& span, int warp)
      : start((span.begin / (kRun * kTile) + warp) * (kRun * kTile)) {}
  COMMVQ_HD void advance() {
    place = place + 1 == kRun ? 0 : place + 1;
    start += place == 0 ? ((kWarps - 1) * kRun + 1) * kTile : kTile;
  }
};

// A slice of the codewords of some stages of one sub-vector.
template <int kWords>
struct Page {
  static constexpr int kWidth = kSliceStep * kWords;

  const AttendSide& side;
  int sub, slice, first_stage, count; // stages
  const uint8_t* codes;               // of the row and head, at the first of the stages
  bool aligned;                       // whether codes can be read four at a time

  COMMVQ_HD Page(const AttendSide& from, int64_t row, int64_t head, int index) : side(from) {
    const int own = pages(from);
    first_stage = index % own * from.page;
    slice = index / own % from.slices;
    sub = index / own / from.slices;
    count = from.stages - first_stage < from.page ? from.stages - first_stage : from.page;
    codes = from.codes + row * from.batch_stride + head * from.head_stride + sub * from.stages +
            first_stage;
    aligned =
        reinterpret_cast<uintptr_t>(codes) % 4 == 0 && from.token_stride % 4 == 0 && count % 4 == 0;
  }

  // Of a slice, and of all.
  COMMVQ_HD static int pages(const AttendSide& side) {
    return static_cast<int>(ceil_div(side.stages, side.page));
  }
  COMMVQ_HD static int number(const AttendSide& side) {
    return side.subs * side.slices * pages(side);
  }
  // The first dim of the slice within its sub-vector, and within the head.
  COMMVQ_HD int offset() const { return slice * kWidth; }
  COMMVQ_HD int64_t dim() const { return static_cast<int64_t>(sub) * side.sub_dim + offset(); }
  // Dims that are not padding.
  COMMVQ_HD int width() const {
    return side.sub_dim - offset() < kWidth ? side.sub_dim - offset() : kWidth;
  }
  // The codes of `token`, or of the last one before `end`: a tile may reach beyond it.
  COMMVQ_HD const uint8_t* codes_of(int64_t token, int64_t end) const {
    return codes + (token < end ? token : end - 1) * side.token_stride;
  }
  COMMVQ_HD bool begins_slice() const { return first_stage == 0; }

  // Copies the codewords to shared memory. Of a group's sum c, which fits a byte, the first stage
  // holds the offset that makes it unsigned, and the others nothing: words of four bytes then just
  // add up, whatever is carried on the way. It becomes c + 128, or 127 - c in groups whose scale
  // changes sign, which are chosen so that the offsets cancel along the sum and it keeps its
  // digits. Scales are 2^15 times their share of the sub-vector's largest. Ends synchronised.
  template <int kThreads>
  COMMVQ_HD void load(int64_t head, const PageMemory& memory) const {
    const int64_t book = (head * side.subs + sub) * side.stages;
    each_thread<kThreads>([&](int thread) {
      for (int stage = thread; stage < side.stages; stage += kThreads) {
        memory.worth[stage] = side.gains == nullptr ? side.scales[book + stage]
                                                    : static_cast<float>(side.gains[book + stage]);
      }
    });
    sync_block();
    each_thread<kThreads>([&](int thread) {
      if (thread == 0) {
        load_scales(memory);
      }
    });
    sync_block();
    each_thread<kThreads>([&](int thread) {
      const int8_t* from = side.books + (book + first_stage) * kCodewords * side.sub_dim;
      load_codewords(from, thread, kThreads, memory);
      load_starts(head, thread, kThreads, memory);
    });
    sync_block();
  }

  // Four codes of a token from the page's stage `stage` on, `codes` being those of its first stage;
  // what is beyond the page is 0.
  COMMVQ_HD uint32_t four_codes(const uint8_t* codes, int stage) const {
    if (aligned) {
      return load_word(codes + stage);
    }
    uint32_t word = 0;
    COMMVQ_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (stage + i < count) {
        word |= static_cast<uint32_t>(codes[stage + i]) << (8 * i);
      }
    }
    return word;
  }

  // Sums up a thread's part of two tokens' codewords: `part` of 0 to 3 holds dims
  // 4 * kWords * part to 4 * kWords * (part + 1) - 1 of the slice. `ahead` holds the tokens' first
  // four codes, and then those of the tokens whose codes are at `next`, so that memory answers in
  // time.
  template <bool kKeys>
  COMMVQ_HD void decode(
      const PageMemory& memory,
      int part,
      const uint8_t* const (&codes)[2],
      const uint8_t* const (&next)[2],
      uint32_t (&ahead)[2],
      Half2 (&out)[2][2 * kWords]) const {
    COMMVQ_UNROLL
    for (int i = 0; i < 2 * kWords; ++i) {
      out[0][i] = out[1][i] = memory.starts[part * 2 * kWords + i];
    }
    if (kKeys && side.group == 2) {
      add_stages<2>(memory, part, codes, next, ahead, out);
    } else {
      add_stages<1>(memory, part, codes, next, ahead, out);
    }
  }

 private:
  COMMVQ_HD void load_scales(const PageMemory& memory) const {
    float most = 0.0f, offset = 0.0f; // of the sum so far
    for (int stage = 0; stage < side.stages; ++stage) {
      const float scale = memory.worth[stage];
      most = larger(scale < 0.0f ? -scale : scale, most);
    }
    const float share = 32768.0f / (most > 0.0f ? most : 1.0f);
    constexpr uint32_t kOffset = 0x80808080u; // 128 in each of four bytes
    bool flip = false;
    for (int stage = 0; stage < count; ++stage) {
      const bool first = stage % side.group == 0;
      if (first) {
        const float scale = memory.worth[first_stage + stage] * share;
        flip = offset * scale > 0.0f;
        Half2& kept = memory.scales[stage / side.group];
        kept = flip ? half2_of(-scale, -scale) : half2_of(scale, scale);
        offset += low(kept) * (flip ? 127.0f : 128.0f);
      }
      memory.flips[stage] = flip ? ~kOffset : kOffset;
      memory.adds[stage] = first ? 0u : flip ? kOffset + 1u : 0u - kOffset;
    }
    offset *= 1.0f / 16777216.0f; // bytes count as 2^-24
    memory.facts->unit = kUnit * (most > 0.0f ? most : 1.0f);
    memory.facts->start = -offset;
    memory.facts->missed = -offset - low(half2_of(-offset, -offset));
  }

  // Keys begin with their means, on the first page of a slice.
  COMMVQ_HD void load_starts(
      int64_t head, int thread, int threads, const PageMemory& memory) const {
    for (int i = thread; i < kWidth / 2; i += threads) {
      float start[2];
      for (int j = 0; j < 2; ++j) {
        const int d = 2 * i + j;
        start[j] = memory.facts->start;
        if (side.means != nullptr && begins_slice() && d < width()) {
          const int64_t place = head * side.subs * side.sub_dim + dim() + d;
          start[j] += static_cast<float>(side.means[place]) / memory.facts->unit;
        }
      }
      memory.starts[i] = half2_of(start[0], start[1]);
    }
  }

  COMMVQ_HD void load_codewords(
      const int8_t* from, int thread, int threads, const PageMemory& memory) const {
    const int rows = count * kCodewords;
    if (side.sub_dim == kWidth && reinterpret_cast<uintptr_t>(from) % sizeof(SixteenBytes) == 0) {
      const SixteenBytes* source = reinterpret_cast<const SixteenBytes*>(from);
      SixteenBytes* target = reinterpret_cast<SixteenBytes*>(memory.table);
      COMMVQ_UNROLL_SOME
      for (int i = thread; i < rows * kWords; i += threads) {
        SixteenBytes some = source[i];
        const int stage = i / (kCodewords * kWords);
        COMMVQ_UNROLL
        for (int j = 0; j < 4; ++j) {
          some.word[j] = (some.word[j] ^ memory.flips[stage]) + memory.adds[stage];
        }
        target[i] = some;
      }
      return;
    }
    uint32_t* target = reinterpret_cast<uint32_t*>(memory.table);
    for (int i = thread; i < rows * kWidth / 4; i += threads) {
      const int row = i / (kWidth / 4), at = i % (kWidth / 4) * 4, stage = row / kCodewords;
      const int8_t* own = from + static_cast<int64_t>(row) * side.sub_dim + offset() + at;
      uint32_t word = 0;
      for (int j = 0; j < 4; ++j) {
        const int value = at + j < width() ? own[j] : 0;
        word |= static_cast<uint32_t>(value & 255) << (8 * j);
      }
      target[i] = (word ^ memory.flips[stage]) + memory.adds[stage];
    }
  }

  template <int kGroup>
  COMMVQ_HD void add_stages(
      const PageMemory& memory,
      int part,
      const uint8_t* const (&codes)[2],
      const uint8_t* const (&next)[2],
      uint32_t (&ahead)[2],
      Half2 (&out)[2][2 * kWords]) const {
    const uint8_t* own = memory.table + part * 4 * kWords;
    const Half2* scales = memory.scales;
    int four = 0;
    for (; four + 4 <= count; four += 4, own += 4 * kCodewords * kWidth, scales += 4 / kGroup) {
      const uint32_t now[2] = {ahead[0], ahead[1]};
      const bool more = four + 4 < count;
      COMMVQ_UNROLL
      for (int i = 0; i < 2; ++i) {
        ahead[i] = more ? four_codes(codes[i], four + 4) : four_codes(next[i], 0);
      }
      COMMVQ_UNROLL
      for (int j = 0; j < 4; j += kGroup) {
        add<kGroup>(own, now, j, scales[j / kGroup], out);
      }
    }
    if (four < count) {
      int j = 0;
      for (; j + kGroup <= count - four; j += kGroup) {
        add<kGroup>(own, ahead, j, scales[j / kGroup], out);
      }
      if (j < count - four) {
        add<1>(own, ahead, j, scales[j / kGroup], out);
      }
      for (int i = 0; i < 2; ++i) {
        ahead[i] = four_codes(next[i], 0);
      }
    }
  }

  // Adds the codewords that bytes `j` to `j` + kGroup - 1 of two words name, of stages from `j` on
  // of those whose codewords are at `own`.
  template <int kGroup>
  COMMVQ_HD static void add(
      const uint8_t* own,
      const uint32_t (&codes)[2],
      int j,
      Half2 scale,
      Half2 (&out)[2][2 * kWords]) {
    COMMVQ_UNROLL
    for (int i = 0; i < 2; ++i) {
      uint32_t words[kWords];
      COMMVQ_UNROLL
      for (int stage = 0; stage < kGroup; ++stage) {
        const uint32_t code = codes[i] >> (8 * (j + stage)) & 255u;
        uint32_t some[kWords];
        read(own + ((j + stage) * kCodewords + code) * kWidth, some);
        COMMVQ_UNROLL
        for (int k = 0; k < kWords; ++k) {
          words[k] = stage == 0 ? some[k] : words[k] + some[k];
        }
      }
      COMMVQ_UNROLL
      for (int k = 0; k < kWords; ++k) {
        out[i][2 * k] = fma2(bytes<0>(words[k]), scale, out[i][2 * k]);
        out[i][2 * k + 1] = fma2(bytes<1>(words[k]), scale, out[i][2 * k + 1]);
      }
    }
  }

  COMMVQ_HD static void read(const uint8_t* from, uint32_t (&words)[kWords]) {
    struct alignas(kWords == 4 ? 16 : kWords == 2 ? 8 : 4) Some {
      uint32_t word[kWords];
    };
    const Some some = *reinterpret_cast<const Some*>(from);
    COMMVQ_UNROLL
    for (int i = 0; i < kWords; ++i) {
      words[i] = some.word[i];
    }
  }
};

} // namespace commvq::gpu
