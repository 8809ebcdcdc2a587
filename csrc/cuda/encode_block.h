// One block of additive encoding: beam search for some tokens of one sub-vector of one group.
//
// A thread stands for a codeword and scores it against every partial sum of every token; then a
// warp picks a token's best. Residuals are kept, so that nothing depends on other tokens and a
// code is the same however many are encoded at once. Of equal scores the earlier partial sum wins,
// then the lower codeword.
#pragma once

#include "cuda/attend_plan.h"

namespace commvq::gpu {

constexpr int kEncodeWarps = 8;
constexpr int kEncodeThreads = kEncodeWarps * kWarp; // as many as there can be codewords
constexpr int kSumsAtOnce = 8; // partial sums that share a reading of the book

struct EncodeArguments {
  int64_t groups, subs, stages, codewords, sub_dim, tokens, beam;
  int64_t together;                                   // tokens of a block
  int64_t x_group, x_token;                           // strides of x; its last axis is contiguous
  int64_t b_group, b_sub, b_stage, b_codeword, b_dim; // strides of the codebooks
  const float* x;                                     // [groups, tokens, subs * sub_dim]
  const float* books;                                 // [groups, subs, stages, codewords, sub_dim]
  uint8_t* codes;                                     // [groups, tokens, subs * stages]

  COMMVQ_HD int64_t blocks_a_unit() const { return ceil_div(tokens, together); }
  COMMVQ_HD int64_t jobs() const { return groups * subs * blocks_a_unit(); }
};

// What a block works in, in shared memory or, for a very wide beam, in global memory. What belongs
// to a stage is there twice, for this stage (stage % 2) and for the next.
struct EncodeMemory {
  int64_t sums, wide, stages; // sums = together * beam
  float* all_residuals;       // [2, sums, wide]
  float* all_scores;          // [2, sums]
  uint8_t* all_codes;         // [2, sums, stages]
  int* all_kept;              // [2, sums]; one a token is used
  float* candidates;          // [sums, kEncodeThreads]
  int* origins;               // [sums]: parent * kEncodeThreads + codeword
  size_t bytes;

  COMMVQ_HD EncodeMemory(Carver start, const EncodeArguments& a)
      : sums(a.together * a.beam), wide(width(a)), stages(a.stages) {
    Carver carver = start;
    all_residuals = carver.take<float>(2 * sums * wide);
    all_scores = carver.take<float>(2 * sums);
    all_codes = carver.take<uint8_t>(2 * sums * stages);
    all_kept = carver.take<int>(2 * sums);
    candidates = carver.take<float>(sums * kEncodeThreads);
    origins = carver.take<int>(sums);
    bytes = carver.used;
  }

  // Floats of a residual: in fours, with zeros behind.
  COMMVQ_HD static int64_t width(const EncodeArguments& a) { return ceil_div(a.sub_dim, 4) * 4; }

  COMMVQ_HD float* residuals(int stage) const { return all_residuals + stage % 2 * sums * wide; }
  COMMVQ_HD float* scores(int stage) const { return all_scores + stage % 2 * sums; }
  COMMVQ_HD uint8_t* codes(int stage) const { return all_codes + stage % 2 * sums * stages; }
  COMMVQ_HD int* kept(int stage) const { return all_kept + stage % 2 * sums; }
};

struct EncodeBlock {
  const EncodeArguments& a;
  const EncodeMemory& memory;
  int64_t group, sub, first;
  int count; // tokens

  COMMVQ_HD static void run(const EncodeArguments& a, int64_t job, char* base) {
    const EncodeMemory memory({base}, a);
    const int64_t unit = job / a.blocks_a_unit();
    const int64_t first = job % a.blocks_a_unit() * a.together, left = a.tokens - first;
    const EncodeBlock block = {
        a,
        memory,
        unit / a.subs,
        unit % a.subs,
        first,
        static_cast<int>(left < a.together ? left : a.together)};
    block.run();
  }

 private:
  COMMVQ_HD void run() const {
    begin();
    for (int stage = 0; stage < static_cast<int>(a.stages); ++stage) {
      const bool last = stage + 1 == a.stages;
      sync_block();
      score(stage);
      sync_block();
      each_warp<kEncodeWarps>([&](int warp) {
        for (int token = warp; token < count; token += kEncodeWarps) {
          choose(stage, warp, token, last ? 1 : static_cast<int>(a.beam));
        }
      });
      sync_block();
      extend(stage, last);
    }
    sync_block();
    finish();
    sync_block(); // before the next job takes the memory
  }

  COMMVQ_HD const float* book(int stage) const {
    return a.books + group * a.b_group + sub * a.b_sub + stage * a.b_stage;
  }

  // The empty sum of every token.
  COMMVQ_HD void begin() const {
    const int64_t width = EncodeMemory::width(a);
    const float* from = a.x + group * a.x_group + first * a.x_token + sub * a.sub_dim;
    each_thread<kEncodeThreads>([&](int thread) {
      for (int64_t i = thread; i < count * width; i += kEncodeThreads) {
        const int64_t token = i / width, d = i % width;
        memory.residuals(0)[token * a.beam * width + d] =
            d < a.sub_dim ? from[token * a.x_token + d] : 0.0f;
      }
      for (int token = thread; token < count; token += kEncodeThreads) {
        memory.kept(0)[token] = 1;
        memory.scores(0)[token * a.beam] = 0.0f;
      }
    });
  }

  // candidates[sum][codeword] = |x - sum - codeword|^2 - |x|^2
  COMMVQ_HD void score(int stage) const {
    const int64_t width = EncodeMemory::width(a);
    const int* kept = memory.kept(stage);
    const float* scores = memory.scores(stage);
    const float* residuals = memory.residuals(stage);
    each_thread<kEncodeThreads>([&](int thread) {
      const float* codeword = book(stage) + thread * a.b_codeword;
      const bool real = thread < a.codewords;
      for (int token = 0; token < count; ++token) {
        for (int64_t from = 0; from < kept[token]; from += kSumsAtOnce) {
          const int64_t first_sum = token * a.beam + from, left = kept[token] - from;
          float product[kSumsAtOnce] = {}, norm = 0.0f;
          for (int64_t d = 0; d < width && real; d += 4) {
            float part[4];
            COMMVQ_UNROLL
            for (int j = 0; j < 4; ++j) {
              part[j] = d + j < a.sub_dim ? codeword[(d + j) * a.b_dim] : 0.0f;
              norm += part[j] * part[j];
            }
            COMMVQ_UNROLL
            for (int i = 0; i < kSumsAtOnce; ++i) {
              if (i < left) {
                const Four r =
                    *reinterpret_cast<const Four*>(residuals + (first_sum + i) * width + d);
                COMMVQ_UNROLL
                for (int j = 0; j < 4; ++j) {
                  product[i] += r.value[j] * part[j];
                }
              }
            }
          }
          COMMVQ_UNROLL
          for (int i = 0; i < kSumsAtOnce; ++i) {
            if (i < left) {
              memory.candidates[(first_sum + i) * kEncodeThreads + thread] =
                  real ? scores[first_sum + i] + (norm - 2.0f * product[i]) : infinity();
            }
          }
        }
      }
    });
  }

  // The `wanted` best candidates of a token, best first. A lane looks after every 32nd of them, and
  // each round one lane loses its best.
  COMMVQ_HD void choose(int stage, int warp, int token, int wanted) const {
    const int64_t place = token * a.beam;
    const int total = memory.kept(stage)[token] * kEncodeThreads;
    float* candidates = memory.candidates + place * kEncodeThreads;
    PerThread<Candidate, kEncodeThreads> own, best;
    each_lane(warp, [&](int thread) { own[thread] = least(candidates, total, thread % kWarp); });
    int found = 0;
    for (; found < wanted; ++found) {
      each_lane(warp, [&](int thread) { best[thread] = own[thread]; });
      warp_join<31>(
          warp,
          [&](int thread) -> Candidate& { return best[thread]; },
          [](Candidate x, Candidate y) { return better(x, y) ? x : y; });
      Candidate now = best[warp * kWarp];
      if (now.index == kNobody && found > 0) {
        break;
      }
      if (now.index == kNobody) {
        now.index = 0; // a NaN or an infinity in x: any valid codeword will do
      }
      each_lane(warp, [&](int thread) {
        if (thread % kWarp == 0) {
          memory.origins[place + found] = now.index;
          memory.scores(stage + 1)[place + found] = now.score;
        }
        if (thread % kWarp == now.index % kWarp) {
          candidates[now.index] = infinity();
          own[thread] = least(candidates, total, thread % kWarp);
        }
      });
    }
    each_lane(warp, [&](int thread) {
      if (thread % kWarp == 0) {
        memory.kept(stage + 1)[token] = found;
      }
    });
  }

  static constexpr int kNobody = 0x7fffffff;

  struct alignas(16) Four {
    float value[4];
  };

  COMMVQ_HD static bool better(const Candidate& x, const Candidate& y) {
    return x.score < y.score || (x.score == y.score && x.index < y.index);
  }

  COMMVQ_HD static Candidate least(const float* candidates, int total, int lane) {
    Candidate best = {infinity(), kNobody};
    for (int i = lane; i < total; i += kWarp) {
      if (candidates[i] < best.score) {
        best = {candidates[i], i};
      }
    }
    return best;
  }

  // The residuals and codes of what was chosen.
  COMMVQ_HD void extend(int stage, bool last) const {
    const int64_t width = EncodeMemory::width(a);
    each_thread<kEncodeThreads>([&](int thread) {
      for (int64_t i = thread; i < count * a.beam; i += kEncodeThreads) {
        const int64_t token = i / a.beam;
        if (i % a.beam < memory.kept(stage + 1)[token]) {
          const int64_t parent = token * a.beam + memory.origins[i] / kEncodeThreads;
          for (int earlier = 0; earlier < stage; ++earlier) {
            memory.codes(stage + 1)[i * a.stages + earlier] =
                memory.codes(stage)[parent * a.stages + earlier];
          }
          memory.codes(stage + 1)[i * a.stages + stage] =
              static_cast<uint8_t>(memory.origins[i] % kEncodeThreads);
        }
      }
      for (int64_t i = thread; i < count * a.beam * width && !last; i += kEncodeThreads) {
        const int64_t sum = i / width, d = i % width, token = sum / a.beam;
        if (sum % a.beam < memory.kept(stage + 1)[token]) {
          const int64_t parent = token * a.beam + memory.origins[sum] / kEncodeThreads;
          const int codeword = memory.origins[sum] % kEncodeThreads;
          const float part =
              d < a.sub_dim ? book(stage)[codeword * a.b_codeword + d * a.b_dim] : 0.0f;
          memory.residuals(stage + 1)[i] = memory.residuals(stage)[parent * width + d] - part;
        }
      }
    });
  }

  COMMVQ_HD void finish() const {
    const uint8_t* found = memory.codes(static_cast<int>(a.stages));
    each_thread<kEncodeThreads>([&](int thread) {
      for (int64_t i = thread; i < count * a.stages; i += kEncodeThreads) {
        const int64_t token = i / a.stages, stage = i % a.stages;
        const int64_t place = (group * a.tokens + first + token) * a.subs + sub;
        a.codes[place * a.stages + stage] = found[token * a.beam * a.stages + stage];
      }
    });
  }
};

// Tokens of a block: as many as it has warps to choose for them, but fewer where that would leave
// processors idle or shared memory does not hold them.
inline int64_t tokens_together(EncodeArguments a, int64_t processors, size_t limit) {
  const int64_t units = a.groups * a.subs;
  for (a.together = kEncodeWarps; a.together > 1; a.together /= 2) {
    if (EncodeMemory(counting(), a).bytes <= limit && units * a.blocks_a_unit() >= processors) {
      break;
    }
  }
  return a.together;
}

} // namespace commvq::gpu
