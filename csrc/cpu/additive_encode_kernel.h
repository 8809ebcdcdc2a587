// The arithmetic of the additive encoder at one SIMD level; see additive_encode.h for the
// contracts. Lanes are codewords. Which sums are looked at may depend on how they were scored, but
// the nearest always are, and how near one is does not: so all levels, block sizes and thread
// counts, and both ways of scoring, give the same bits.

#include "cpu/ints.h"

#include "cpu/additive_encode_round.h"

#include "cpu/additive_encode_scores.h"

#include "cpu/additive_encode_choose.h"

static int64_t extend(
    const Codebooks& books,
    int64_t stage,
    const float* x,
    const Parents& parents,
    const Table& table,
    const int16_t* base,
    const Workspace& room,
    const Beam& beam) {
  const int64_t columns = parents.count << books.shift;
  const float* residuals = nullptr;
  Scale scale = {};
  scale.broken = true;
  if (table.rows != nullptr) {
    const Stage& own = books.stages[stage];
    const float far = __builtin_sqrtf(parents.score[parents.count - 1]);
    scale = scale_of(parents, own.longest, far, table.unit);
    const float most = 2.0f * (far + own.reach) * own.longest + own.longest * own.longest;
    scale.error = kTableError * static_cast<float>(stage + 1) + 1.0f;
    scale.broken = scale.broken || !(most * scale.inverse < kMostRounded) || scale.error > kSlack;
    if (!scale.broken) {
      scores_by_table(books, stage, parents, table.rows, base, scale, room.scores);
    }
  }
  if (scale.broken) { // few vectors, or one that is longer than most
    scale = scores_by_bytes(books, stage, x, parents, room);
    residuals = room.residuals;
  }
  int64_t found = 0;
  if (!scale.broken) {
    if (books.codewords < books.width) {
      far_away(books, parents.count, room.scores);
    }
    int32_t limit = 0;
    if (beam.capacity <= kMinima) {
      int32_t minima[kMinima];
      least_scores(room.scores, columns, minima);
      limit = bound(minima, beam.capacity);
    } else {
      limit = narrowest(room.scores, columns, beam.capacity);
    }
    // Both this one and those that it stands for may be off.
    const float reach = static_cast<float>(limit) + 2.0f * scale.error + 1.0f;
    const auto most = static_cast<int16_t>(reach < 32767.0f ? reach : 32767.0f);
    found = shortlist(room.scores, columns, most, room.list);
    found = look(books, stage, x, parents, residuals, room, found);
  }
  if (found == 0) { // a NaN or an infinity: any valid codeword will do
    beam.score[0] = __builtin_inff();
    beam.origin[0] = 0;
    return 1;
  }
  return found <= kRanked ? rank(room.list, room.nearness, found, beam)
                          : insert_all(room.list, room.nearness, found, beam);
}

static const EncodeKernels kernels = {square, round_row, largest, round_bytes, products, extend};
