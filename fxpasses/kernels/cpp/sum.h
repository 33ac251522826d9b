// A sum of images, of which each may be some channels of one that has more.

#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>

#include "vectors.h"

namespace {

using std::int64_t;

// `steps`: floats from a pixel of each image to its next.
void sum(const float* const* images, const int64_t* steps, int64_t count, int64_t pixels, int64_t c, float* out,
         int threads) {
#pragma omp parallel for num_threads(threads) if (pixels * c > 8192)
  for (int64_t pixel = 0; pixel < pixels; pixel++) {
    float* const to = out + pixel * c;
    for (int64_t from = 0; from < c && c >= VL; from += VL) {
      const int64_t at = std::min(from, c - VL);  // the last vector may overlap the one before
      Vec total = load(images[0] + pixel * steps[0] + at);
      for (int64_t which = 1; which < count; which++) total += load(images[which] + pixel * steps[which] + at);
      store(to + at, total);
    }
    for (int64_t at = 0; at < c && c < VL; at++) {
      float total = images[0][pixel * steps[0] + at];
      for (int64_t which = 1; which < count; which++) total += images[which][pixel * steps[which] + at];
      to[at] = total;
    }
  }
}

}  // namespace
