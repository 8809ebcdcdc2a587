// Runs the blocks of attention over the published preset's codes on the host, for the tests.
#include "cuda/attend_value.h"
#include "cuda/published_block.h"
#include "given.h"
#include "guarded.h"

using namespace commvq::gpu;

struct PublishedSizes {
  int64_t batch, heads, queries, dim, pairs, tokens, stop, turn_rows, turn_blocks;
  int64_t rounds, panels, groups, key_bytes, value_bytes, splits, backwards;
};

// What published_attend.cu does, with `splits`. `pointers` are the operator's tensors in order
// (query, key codes, words, value codes, turns, steps, first), then its outputs.
extern "C" int commvq_published(const PublishedSizes* given, void** pointers, float softcap) {
  const PublishedSizes& sizes = *given;
  run_backwards = sizes.backwards != 0;
  const int64_t units = sizes.batch * sizes.heads;
  const Guarded query(sizeof(float) * units * sizes.queries * sizes.dim, pointers[0]);
  const Guarded keys(sizes.batch * sizes.tokens * sizes.key_bytes, pointers[1]);
  const Guarded words(
      sizeof(int16_t) * sizes.heads * sizes.rounds * kRoundWords * sizes.panels * 2 * kPanelPairs,
      pointers[2]);
  const Guarded values(sizes.batch * sizes.tokens * sizes.value_bytes, pointers[3]);
  const Guarded turns(
      sizeof(float) * sizes.turn_rows * sizes.turn_blocks * 2 * sizes.pairs, pointers[4]);
  const Guarded steps(sizeof(float) * kTurnBlock * 2 * sizes.pairs, pointers[5]);
  PublishedArguments m = {};
  AttendArguments& a = m.a;
  a.heads = sizes.heads;
  a.queries = sizes.queries;
  a.dim = 2 * sizes.groups;
  a.pairs = sizes.pairs;
  a.stop = sizes.stop;
  a.turn_rows = sizes.turn_rows;
  a.turn_blocks = sizes.turn_blocks;
  a.query = query.as<float>();
  a.turns = turns.as<float>();
  a.steps = steps.as<float>();
  a.first = static_cast<const int64_t*>(pointers[6]);
  a.softcap = softcap;
  m.head_dim = sizes.dim;
  m.rounds = sizes.rounds;
  m.panels = sizes.panels;
  m.groups = sizes.groups;
  m.words = words.as<int16_t>();
  m.keys = {keys.as<uint8_t>(), sizes.tokens * sizes.key_bytes, sizes.key_bytes};
  m.values = {values.as<uint8_t>(), sizes.tokens * sizes.value_bytes, sizes.value_bytes};
  m.tiles = ceil_div(sizes.queries, kRows);
  if (a.stop > 0) {
    a.split_tokens = ceil_div(ceil_div(a.stop, sizes.splits), kTurnBlock) * kTurnBlock;
    a.splits = ceil_div(a.stop, a.split_tokens);
  }
  const Left left(a, units, 1);
  const size_t bytes = PublishedShared(Carver{nullptr}).carver.used;
  const int64_t count = units * m.tiles * a.splits;
  for (int64_t i = 0; i < count; ++i) {
    Guarded memory(bytes, 0xff);
    PublishedBlock::run(m, in_order(i, count), memory.data());
  }
  // merge() finds the outputs behind the eleven tensors of additive_attend.
  void* outputs[14] = {};
  std::copy(pointers + 7, pointers + 10, outputs + 11);
  merge(a, units, outputs);
  return 0;
}
