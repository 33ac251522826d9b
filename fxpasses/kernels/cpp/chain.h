// A chain: convolutions of which each reads only the one before, made row by row.
//
//     image    =====================       For the next rows of the last result, each stage makes the rows that
//     stage 0      [window of rows]        they need of its own and keeps those that the next will need again.
//     stage 1        [window]              None but the last leaves the nearer caches.
//     result   =========> next rows

#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "depthwise.h"
#include "dispatch.h"
#include "few_channels.h"
#include "memory.h"
#include "product.h"
#include "slide.h"
#include "step_times.h"
#include "work.h"

namespace {

// One convolution of a chain: the first, or one that reads what the stage before it gives.
struct Stage {
  Geometry g;
  Kernel kernel;
  Activation after;
  Packed weight;
  const float* other;

  int64_t row() const { return g.ow * g.k; }
  // The rows of its image that it reads for rows `low` to `high` of its result.
  std::pair<int64_t, int64_t> reads(int64_t low, int64_t high) const {
    const int64_t start = std::clamp<int64_t>(low * g.sh - g.ph, 0, g.h);
    return {start, std::clamp<int64_t>((high - 1) * g.sh - g.ph + (g.kh - 1) * g.dh + 1, start, g.h)};
  }
  // Those rows of the result for image `n` of the batch. `sample` is where the image's first row is or would be.
  void make(int64_t n, int64_t low, int64_t high, const float* sample, float* to, bool near, Scratch& scratch) const {
    const float* add = other ? other + (n * g.oh + low) * row() : nullptr;
    if (kernel.kind == Kind::DEPTHWISE) {
      const Row one = depthwise_row_for(g);
      for (int64_t y = low; y < high; y++)
        one(g, after, sample, weight.floats, to + (y - low) * row(), y * g.sh - g.ph, 0, g.c);
    } else if (kernel.kind == Kind::FEW_CHANNELS) {
      const RowOfFew one = row_of_few_for(kernel);
      for (int64_t y = low; y < high; y++)
        one(g, after, sample, kernel.planar, weight.floats, add ? add + (y - low) * row() : nullptr,
            to + (y - low) * row(), y * g.sh - g.ph, scratch);
    } else if (kernel.kind == Kind::SLIDING) {
      const Geometry group = of_one_group(g, kernel);
      const RowOfGroups one = row_of_groups_for(group);
      if ((int64_t)scratch.zeros.size() < group.c + VL) scratch.zeros.resize(group.c + VL);
      for (int64_t p = 0; p < g.k / VL / vectors_together(group); p++)
        for (int64_t y = low; y < high; y++)
          one(group, after, sample, scratch.zeros.data(), weight.floats, add ? add + (y - low) * row() : nullptr,
              to + (y - low) * row(), y * g.sh - g.ph, p);
    } else {
      product_of_pixels_for(kernel)(g, after, sample + low * g.w * g.c, weight.floats, add, to, (high - low) * g.w, near);
    }
  }
};

// Convolutions of which each reads only the one before: rows of each are made as the next needs them, and none but
// the last leaves the nearer caches.
class Chain {
 public:
  Chain(const std::vector<Stage>& stages, const float* image, int threads)
      : stages(stages), image(image), threads(threads) {
    constexpr int64_t NEAR = 65536;  // floats of the rows in between
    while (band < stages.back().g.oh && floats_for(band + 1) <= NEAR) band++;
  }

  void run(float* out) const {
    const Geometry& g = stages.back().g;
    const int64_t share = floats_for(band), lines = g.n * g.oh;
    const Floats space(share * threads);
    float* const memory = space.get();
    Work work(lines, threads, band);
#pragma omp parallel num_threads(threads)
    {
      const int64_t me = omp_get_thread_num();
      Thread mine{std::vector<Window>(stages.size()), {}};
      float* place = memory + share * me;
      for (size_t which = 0; which + 1 < stages.size(); which++) {
        mine.windows[which].memory = place;
        place += rows_for(band, which) * stages[which].row();
      }
      work.share([&](int64_t low, int64_t high) {
        for (int64_t at = low; at < high;) {
          const int64_t n = at / g.oh, y = at % g.oh, rows = std::min({band, g.oh - y, high - at});
          make(mine, stages.size() - 1, n, y, y + rows, out + at * stages.back().row());
          at += rows;
        }
      });
    }
  }

 private:
  struct Window {
    float* memory = nullptr;
    int64_t n = -1, start = 0, stop = 0;  // rows `start` to `stop` of image `n` are in it
  };
  struct Thread {
    std::vector<Window> windows;
    Scratch scratch;
  };

  const std::vector<Stage>& stages;
  const float* image;
  int threads;
  int64_t band = 1;  // rows of the last result that are made together

  // The most rows of a stage's result that `rows` of the last one's need.
  int64_t rows_for(int64_t rows, size_t which) const {
    for (size_t reader = stages.size() - 1; reader > which; reader--) {
      const Geometry& g = stages[reader].g;
      rows = std::min((rows - 1) * g.sh + (g.kh - 1) * g.dh + 1, g.h);
    }
    return rows;
  }
  int64_t floats_for(int64_t rows) const {
    int64_t sum = 0;
    for (size_t which = 0; which + 1 < stages.size(); which++) sum += rows_for(rows, which) * stages[which].row();
    return sum;
  }

  void make(Thread& mine, size_t which, int64_t n, int64_t low, int64_t high, float* to) const {
    const Stage& stage = stages[which];
    const Geometry& g = stage.g;
    const float* sample = image + n * g.h * g.w * g.c;
    if (which > 0) {
      const auto [start, stop] = stage.reads(low, high);
      sample = held(mine, which - 1, n, start, stop);
    }
    const StageClock clock(which);
    stage.make(n, low, high, sample, to, which + 1 < stages.size(), mine.scratch);
  }

  // Where the first row of a stage's result would be, with rows `low` to `high` there.
  const float* held(Thread& mine, size_t which, int64_t n, int64_t low, int64_t high) const {
    Window& window = mine.windows[which];
    const int64_t row = stages[which].row();
    const bool overlaps = window.n == n && window.start <= low && low < window.stop;
    const int64_t kept = overlaps ? std::min(window.stop, high) - low : 0;
    if (kept > 0) std::memmove(window.memory, window.memory + (low - window.start) * row, kept * row * sizeof(float));
    if (low + kept < high) make(mine, which, n, low + kept, high, window.memory + kept * row);
    window.n = n, window.start = low, window.stop = high;
    return window.memory - low * row;
  }
};

void check_stage(const Stage& stage, bool first) {
  const Geometry& g = stage.g;
  check_kernel(g, stage.kernel, stage.other);
  const Kind kind = stage.kernel.kind;
  require(first || kind != Kind::FEW_CHANNELS, "only the first of a chain has few channels");
  require(kind == Kind::DEPTHWISE || kind == Kind::FEW_CHANNELS || kind == Kind::SLIDING ||
              (g.groups == 1 && g.in_line && stage.kernel.is_blocked_product()),
          "a product over single pixels, or taps that pass over the rows of each channel or group");
  check_packed(stage.weight, of_one_group(g, stage.kernel), stage.kernel);
}

}  // namespace
