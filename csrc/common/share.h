// Work for all threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace commvq {

// Calls work(i) for every i below `count`. Each thread takes the next one when it is done with its
// last, so that none waits long for another that has less of the machine.
template <class Work>
void share_out(int64_t count, const Work& work) {
  std::atomic<int64_t> next{0};
  const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
  torch::stable::parallel_for(0, std::min(count, threads), 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) {
      work(i);
    }
  });
}

} // namespace commvq
