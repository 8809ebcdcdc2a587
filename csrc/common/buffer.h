// Scratch memory for kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace commvq {

// An array of plain values on a cache line's boundary, not initialised: only pages that are written
// cost anything.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(
            static_cast<T*>(
                ::operator new(sizeof(T) * static_cast<size_t>(count), std::align_val_t{64}))) {}
  ~Buffer() { ::operator delete(data_, std::align_val_t{64}); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() const { return data_; }
  T& operator[](int64_t index) const { return data_[index]; }

 private:
  T* data_;
};

} // namespace commvq
