// Copies from global to shared memory that go on while a thread computes. On the host a copy is
// made when it is waited for: who reads too early finds what was there before.
#pragma once

#include "cuda/portable.h"

#if !COMMVQ_DEVICE
#include <utility>
#include <vector>
#endif

namespace commvq::gpu {

// 16 bytes on a GPU: what a thread of a warp that reads 512 bytes in a row gets.
struct alignas(16) FourHalf2 {
  Half2 part[4];
};

// Of the threads of a block. A thread starts copies, closes them off as a group, and waits until
// all but the last `kPending` groups have arrived; others see them after a sync_block().
template <int kThreads>
class AsyncCopies {
 public:
#if COMMVQ_DEVICE
  __device__ __forceinline__ void start(int, FourHalf2* to, const FourHalf2* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                     static_cast<uint32_t>(__cvta_generic_to_shared(to))),
                 "l"(from)
                 : "memory");
  }
  __device__ __forceinline__ void close(int) {
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
  template <int kPending>
  __device__ __forceinline__ void wait(int) {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
  }
#else
  void start(int thread, FourHalf2* to, const FourHalf2* from) {
    open_[thread].push_back({to, from});
  }
  void close(int thread) { groups_[thread].push_back(std::exchange(open_[thread], {})); }
  template <int kPending>
  void wait(int thread) {
    auto& groups = groups_[thread];
    while (groups.size() > kPending) {
      for (const auto& [to, from] : groups.front()) {
        *to = *from;
      }
      groups.erase(groups.begin());
    }
  }

 private:
  using Group = std::vector<std::pair<FourHalf2*, const FourHalf2*>>;
  Group open_[kThreads];
  std::vector<Group> groups_[kThreads];
#endif
};

} // namespace commvq::gpu
