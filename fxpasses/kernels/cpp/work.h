// Work that threads share: each begins with a part of its own, and one that is done early helps the others.
//
//     items      0  1  2  3  4  5  6  7  8  9 | 10 11 12 13 14 15 16 17 18 19
//     thread 0   0  1  2  3  4  5  6  7  8  9, then 17 18 19, which thread 1 has not begun
//     thread 1  10 11 12 13 14 15 16

#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace {

using std::int64_t;

// Items that the threads of a parallel region share. What each begins with is the same in every step, so that it reads
// what it wrote.
class Work {
 public:
  // `alone`: a multiple of so many items is done by one thread, one after another.
  Work(int64_t count, int threads, int64_t alone = 1)
      : count(count), chunk((count + threads * PARTS * alone - 1) / (threads * PARTS * alone) * alone), next(threads) {}

  // Calls `use` with ranges of items until all are taken.
  template <class Use>
  void share(const Use& use) {
    const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
    for (int64_t other = 0; other < all; other++) {
      const int64_t whose = (me + other) % all, low = count * whose / all, high = count * (whose + 1) / all;
      for (;;) {
        const int64_t from = low + next[whose].taken.fetch_add(chunk, std::memory_order_relaxed);
        if (from >= high) break;
        use(from, std::min(high, from + chunk));
      }
    }
  }

 private:
  static constexpr int64_t PARTS = 8;  // of what each thread begins with
  struct alignas(64) Taken {
    std::atomic<int64_t> taken{0};
  };
  int64_t count, chunk;
  std::vector<Taken> next;
};

// Items `low` to `high` of those that are a panel's blocks and then the next one's.
template <class Use>
inline void by_panels(int64_t low, int64_t high, int64_t blocks, const Use& use) {
  while (low < high) {
    const int64_t panel = low / blocks, end = std::min(high, (panel + 1) * blocks);
    use(panel, low - panel * blocks, end - panel * blocks);
    low = end;
  }
}

}  // namespace
