// Work for all threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace commvq {

// A stretch of numbers that is taken from at both ends, by any thread.
class Stretch {
 public:
  static constexpr int64_t kNone = -1;

  void set(int64_t begin, int64_t end) {
    rest_ = pack(static_cast<uint64_t>(begin), static_cast<uint64_t>(end));
  }

  // One that nobody has taken: the first, or the last.
  int64_t take(bool first) {
    for (uint64_t rest = rest_;;) {
      const uint64_t begin = rest >> kBits, end = rest & kMask;
      if (begin >= end) {
        return kNone;
      }
      const uint64_t less = first ? pack(begin + 1, end) : pack(begin, end - 1);
      if (rest_.compare_exchange_weak(rest, less)) {
        return static_cast<int64_t>(first ? begin : end - 1);
      }
    }
  }

 private:
  static constexpr int kBits = 32;
  static constexpr uint64_t kMask = 0xffffffff;

  static uint64_t pack(uint64_t begin, uint64_t end) { return begin << kBits | end; }

  alignas(64) std::atomic<uint64_t> rest_{0};
};

// Calls work(i) for every i below `count`, less than 2^32. Each thread begins with neighbours,
// which often read the same memory; one that is done takes the last of another's, so that none
// waits long for one that has less of the machine.
template <class Work>
void share_out(int64_t count, const Work& work) {
  const auto most = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t threads = std::max<int64_t>(std::min(count, most), 1);
  std::vector<Stretch> stretches(static_cast<size_t>(threads));
  for (int64_t i = 0; i < threads; ++i) {
    stretches[static_cast<size_t>(i)].set(count * i / threads, count * (i + 1) / threads);
  }
  torch::stable::parallel_for(0, threads, 1, [&](int64_t from, int64_t) {
    // A thread that has several places begins at the first: the rest are others' to it.
    for (int64_t offset = 0; offset < threads; ++offset) {
      Stretch& stretch = stretches[static_cast<size_t>((from + offset) % threads)];
      for (int64_t i = stretch.take(offset == 0); i != Stretch::kNone;
           i = stretch.take(offset == 0)) {
        work(i);
      }
    }
  });
}

} // namespace commvq
