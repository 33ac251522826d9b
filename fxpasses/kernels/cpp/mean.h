// The mean of each channel over an image's pixels, four vectors of channels at a time.

#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "blocks.h"
#include "vectors.h"

namespace {

// The images' means of each channel. Long sums are made of shorter ones here too.
void mean(const float* image, int64_t n, int64_t pixels, int64_t c, float* out, int threads) {
  constexpr int64_t WIDE = 4;
  const int64_t strips = (c + WIDE * VL - 1) / (WIDE * VL), work = n * strips;
#pragma omp parallel for schedule(static) num_threads(threads) if (n * pixels * c > 8192)
  for (int64_t item = 0; item < work; item++) {
    const float* sample = image + item / strips * pixels * c;
    float* to = out + item / strips * c;
    const int64_t from = item % strips * WIDE * VL, width = std::min(c - from, WIDE * VL);
    Vec total[WIDE] = {};
    for (int64_t start = 0; start < pixels; start += TOGETHER) {
      Vec sum[WIDE] = {};
      for (int64_t pixel = start; pixel < std::min(pixels, start + TOGETHER); pixel++) {
        const float* at = sample + pixel * c + from;
        for (int64_t v = 0; v < WIDE; v++) {
          if ((v + 1) * VL <= width) {
            sum[v] += load(at + v * VL);
          } else if (v * VL < width) {
            float part[VL] = {};
            std::memcpy(part, at + v * VL, (width - v * VL) * sizeof(float));
            sum[v] += load(part);
          }
        }
      }
      for (int64_t v = 0; v < WIDE; v++) total[v] += sum[v];
    }
    float means[WIDE * VL];
    for (int64_t v = 0; v < WIDE; v++) store(means + v * VL, total[v] / splat((float)pixels));
    std::memcpy(to + from, means, width * sizeof(float));
  }
}

}  // namespace
