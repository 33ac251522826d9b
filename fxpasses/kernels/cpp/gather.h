// What is computed of an image while it is read, or copied:
//
//     clamp(concatenation of images along the channels * scale or gate + shift)

#pragma once

#include <omp.h>

#include <cstdint>
#include <cstring>

#include "geometry.h"
#include "vectors.h"

namespace {

// What a product over single pixels may do with an image while it reads it: images that stand for one another's
// further channels, times a scale, plus a shift, clamped.
struct Source {
  int64_t count;
  const float* const* images;
  const int64_t *widths, *steps;  // channels that are read of each image; floats from its pixel to the next
  const float *scale, *shift;  // of each channel, or null
  int64_t scale_step;          // floats from the scale of one image of the batch to that of the next
  bool clamped;
  float low, high;

  // The pixels that `g` reads for results `first` to `last`, end to end.
  void gather(const Geometry& g, int64_t first, int64_t last, float* to) const {
    int64_t x = first % g.ow, y = first / g.ow % g.oh, n = first / g.ow / g.oh;
    for (int64_t pixel = first; pixel < last; pixel++) {
      const int64_t place = (n * g.h + y * g.sh) * g.w + x * g.sw;
      const float *times = scale ? scale + n * scale_step : nullptr, *plus = shift;
      if (++x == g.ow) {
        x = 0;
        if (++y == g.oh) y = 0, n++;
      }
      for (int64_t which = 0; which < count; which++) {
        const int64_t width = widths[which];
        const float* from = images[which] + place * steps[which];
        int64_t c = 0;
        for (; c + VL <= width; c += VL) store(to + c, changed(load(from + c), times, plus, c));
        if (c < width) {
          float part[VL] = {}, factors[VL] = {}, terms[VL] = {};
          const int64_t rest = (width - c) * sizeof(float);
          std::memcpy(part, from + c, rest);
          if (times) std::memcpy(factors, times + c, rest);
          if (plus) std::memcpy(terms, plus + c, rest);
          store(part, changed(load(part), times ? factors : nullptr, plus ? terms : nullptr, 0));
          std::memcpy(to + c, part, rest);
        }
        to += width;
        if (times) times += width;
        if (plus) plus += width;
      }
    }
  }

  inline Vec changed(Vec value, const float* times, const float* plus, int64_t c) const {
    if (times && plus)
      value = fma(value, load(times + c), load(plus + c));
    else if (times)
      value = value * load(times + c);
    else if (plus)
      value = value + load(plus + c);
    return clamped ? below(high, above(low, value)) : value;
  }
};

// A copy of what a source gives, such as an image times a gate.
void gathered(const Source& source, const Geometry& g, float* out, int threads) {
  const int64_t pixels = g.n * g.oh * g.ow;
#pragma omp parallel num_threads(threads) if (pixels * g.c > 8192)
  {
    const int64_t me = omp_get_thread_num(), all = omp_get_num_threads(), from = pixels * me / all;
    source.gather(g, from, pixels * (me + 1) / all, out + from * g.c);
  }
}

}  // namespace
