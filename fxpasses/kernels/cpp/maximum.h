// The largest number of each channel under a window; NaN where there is one, as torch has it.

#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "geometry.h"
#include "vectors.h"

namespace {

// `g` is of windows of which each holds a pixel of the image (window_of).
void maximum(const Geometry& g, const float* image, float* out, int threads) {
  constexpr float LEAST = -std::numeric_limits<float>::infinity();
  const int64_t rows = g.n * g.oh;
#pragma omp parallel for num_threads(threads) if (rows * g.ow * g.c > 8192)
  for (int64_t row = 0; row < rows; row++) {
    const float* const sample = image + row / g.oh * g.h * g.w * g.c;
    const int64_t top = row % g.oh * g.sh - g.ph;
    for (int64_t x = 0; x < g.ow; x++) {
      float* const to = out + (row * g.ow + x) * g.c;
      const auto each = [&](const auto& use) {
        for (int64_t i = 0; i < g.kh; i++)
          for (int64_t j = 0; j < g.kw; j++) {
            const int64_t y = top + i * g.dh, side = x * g.sw - g.pw + j * g.dw;
            if ((uint64_t)y < (uint64_t)g.h && (uint64_t)side < (uint64_t)g.w) use(sample + (y * g.w + side) * g.c);
          }
      };
      for (int64_t from = 0; from < g.c && g.c >= VL; from += VL) {
        const int64_t at = std::min(from, g.c - VL);  // the last vector may overlap the one before
        Vec most = splat(LEAST);
        each([&](const float* pixel) {
          const Vec value = load(pixel + at);
          const Ints takes = (value > most) | (value != value);
          most = takes ? value : most;
        });
        store(to + at, most);
      }
      for (int64_t at = 0; at < g.c && g.c < VL; at++) {
        float most = LEAST;
        each([&](const float* pixel) { most = pixel[at] > most || pixel[at] != pixel[at] ? pixel[at] : most; });
        to[at] = most;
      }
    }
  }
}

}  // namespace
