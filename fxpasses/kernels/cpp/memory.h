// Blocks of floats whose first one begins a line of the caches.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace {

using std::int64_t;

// Memory for `count` floats, which hold anything.
class Floats {
 public:
  explicit Floats(int64_t count) {
    constexpr std::size_t LINE = 64;
    const std::size_t bytes = (count * sizeof(float) / LINE + 1) * LINE;
    memory.reset(static_cast<float*>(std::aligned_alloc(LINE, bytes)));
    if (!memory) throw std::bad_alloc();
  }

  float* get() const { return memory.get(); }

 private:
  struct Free {
    void operator()(float* block) const { std::free(block); }
  };
  std::unique_ptr<float, Free> memory;
};

}  // namespace
