// Memory that ends where a page ends that nobody may touch: reading or writing past it is a crash,
// not a wrong number.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

class Guarded {
 public:
  Guarded(size_t bytes, int fill) : Guarded(bytes) { std::memset(start_, fill, bytes_); }
  Guarded(size_t bytes, const void* from) : Guarded(bytes) { std::memcpy(start_, from, bytes_); }
  ~Guarded() { munmap(mapped_, length_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  char* data() const { return start_; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(start_);
  }

 private:
  explicit Guarded(size_t bytes) : bytes_(bytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t body = (bytes + page - 1) / page * page;
    length_ = body + page;
    void* found =
        mmap(nullptr, length_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (found == MAP_FAILED || mprotect(static_cast<char*>(found) + body, page, PROT_NONE) != 0) {
      throw std::bad_alloc();
    }
    mapped_ = static_cast<char*>(found);
    start_ = mapped_ + body - bytes;
  }

  size_t bytes_, length_ = 0;
  char *mapped_ = nullptr, *start_ = nullptr;
};
