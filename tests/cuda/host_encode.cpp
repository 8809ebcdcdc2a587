// Runs the blocks of encoding and the bit layout of packed codes on the host, for the tests.
#include "cuda/encode_block.h"
#include "cuda/pack_bits.h"
#include "guarded.h"

#include <algorithm>
#include <cstdint>

using namespace commvq::gpu;

// sizes: groups, subs, stages, codewords, sub_dim, tokens, beam, together, the strides of x (group,
// token) and of the codebooks (five), and whether to run backwards.
extern "C" void commvq_encode(
    const int64_t* sizes, const float* x, const float* books, uint8_t* codes) {
  EncodeArguments a = {
      sizes[0],
      sizes[1],
      sizes[2],
      sizes[3],
      sizes[4],
      sizes[5],
      1,
      sizes[7],
      sizes[8],
      sizes[9],
      sizes[10],
      sizes[11],
      sizes[12],
      sizes[13],
      sizes[14],
      x,
      books,
      codes};
  for (int64_t stage = 0; stage < a.stages && a.beam < sizes[6]; ++stage) {
    a.beam = std::min(sizes[6], a.beam * a.codewords);
  }
  run_backwards = sizes[15] != 0;
  for (int64_t job = 0; job < a.jobs(); ++job) {
    const Guarded memory(EncodeMemory({nullptr}, a).bytes, 0xff);
    EncodeBlock::run(a, run_backwards ? a.jobs() - 1 - job : job, memory.data());
  }
}

extern "C" int64_t commvq_tokens_together(
    int64_t groups,
    int64_t subs,
    int64_t stages,
    int64_t sub_dim,
    int64_t tokens,
    int64_t beam,
    int64_t processors,
    int64_t limit) {
  EncodeArguments a = {};
  a.groups = groups;
  a.subs = subs;
  a.stages = stages;
  a.codewords = 256;
  a.sub_dim = sub_dim;
  a.tokens = tokens;
  a.beam = beam;
  return tokens_together(a, processors, static_cast<size_t>(limit));
}

extern "C" void commvq_pack(const uint8_t* codes, int64_t count, int bits, uint8_t* packed) {
  const Guarded from(static_cast<size_t>(count), codes);
  for (int64_t at = 0; at < packed_width(count, bits); ++at) {
    packed[at] = packed_byte(from.as<uint8_t>(), count, bits, at);
  }
}

extern "C" void commvq_unpack(const uint8_t* packed, int64_t count, int bits, uint8_t* codes) {
  const Guarded from(static_cast<size_t>(packed_width(count, bits)), packed);
  for (int64_t i = 0; i < count; ++i) {
    codes[i] = unpacked_code(from.as<uint8_t>(), bits, i);
  }
}
