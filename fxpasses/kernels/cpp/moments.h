// Mean and variance of each group of channels, as group norms and instance norms need them.
//
// Sums are taken of distances from about each channel's mean, so that a large one does not drown a small variance;
// short ones in floats, whose totals are doubles. Groups are put together from their channels.

#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "vectors.h"

namespace {

using std::int64_t;

// The mean of a few pixels of a channel.
inline float pivot_of(const float* image, int64_t pixels, int64_t c, int64_t channel) {
  const int64_t few = std::min<int64_t>(pixels, 8);
  float sum = 0;
  for (int64_t at = 0; at < few; at++) sum += image[pixels * at / few * c + channel];
  return sum / (float)few;
}

// Adds to each channel's `sums` and `squares` what distances pixels `from` to `to` of an image have from `pivots`.
void add_moments(const float* image, const float* pivots, int64_t from, int64_t to, int64_t c, double* sums,
                 double* squares) {
  constexpr int64_t WIDE = 4, PIXELS = 64;
  float partial[2][WIDE * VL];
  for (int64_t start = from; start < to; start += PIXELS) {
    const int64_t end = std::min(to, start + PIXELS);
    for (int64_t first = 0; first < c; first += WIDE * VL) {
      const int64_t width = std::min(c - first, WIDE * VL), whole = width / VL;
      Vec pivot[WIDE] = {}, sum[WIDE] = {}, square[WIDE] = {};
      const auto part = [&](const float* at) {
        float rest[VL] = {};
        std::memcpy(rest, at + whole * VL, (width - whole * VL) * sizeof(float));
        return load(rest);
      };
      const auto each = [&](auto vectors, bool has_rest) {
        for (int64_t v = 0; v < vectors; v++) pivot[v] = load(pivots + first + v * VL);
        if (has_rest) pivot[vectors] = part(pivots + first);
        for (int64_t pixel = start; pixel < end; pixel++) {
          const float* at = image + pixel * c + first;
          for (int64_t v = 0; v < vectors; v++) {
            const Vec distance = load(at + v * VL) - pivot[v];
            sum[v] += distance;
            square[v] = fma(distance, distance, square[v]);
          }
          if (has_rest) {
            const Vec distance = part(at) - pivot[vectors];
            sum[vectors] += distance;
            square[vectors] = fma(distance, distance, square[vectors]);
          }
        }
      };
      if (width == WIDE * VL) each(Constant<WIDE>{}, false);
      else if (whole == 2) each(Constant<2>{}, width > 2 * VL);
      else if (whole == 3) each(Constant<3>{}, width > 3 * VL);
      else if (whole == 1) each(Constant<1>{}, width > VL);
      else each(Constant<0>{}, true);
      for (int64_t v = 0; v < WIDE; v++) store(partial[0] + v * VL, sum[v]), store(partial[1] + v * VL, square[v]);
      for (int64_t at = 0; at < width; at++) {
        sums[first + at] += partial[0][at];
        squares[first + at] += partial[1][at];
      }
    }
  }
}

// Variances and then means of `n` images' groups; threads share the pixels of each image.
void moments(const float* image, int64_t n, int64_t pixels, int64_t c, int64_t groups, float* out, int threads) {
  if (n * pixels * c <= 16384) threads = 1;
  const int64_t width = c / groups;
  std::vector<double> totals(threads * n * 2 * c);
#pragma omp parallel num_threads(threads)
  {
    const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
    std::vector<float> pivots(c);
    for (int64_t sample = 0; sample < n; sample++) {
      const float* const at = image + sample * pixels * c;
      for (int64_t channel = 0; channel < c; channel++) pivots[channel] = pivot_of(at, pixels, c, channel);
      double* const mine = totals.data() + (me * n + sample) * 2 * c;
      add_moments(at, pivots.data(), pixels * me / all, pixels * (me + 1) / all, c, mine, mine + c);
    }
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t item = 0; item < n * groups; item++) {
      const int64_t sample = item / groups, first = item % groups * width;
      const float* const at = image + sample * pixels * c;
      const auto total = [&](int64_t which, int64_t channel) {
        double found = 0;
        for (int64_t other = 0; other < all; other++)
          found += totals[(other * n + sample) * 2 * c + which * c + channel];
        return found / (double)pixels;
      };
      double mean = 0, spread = 0;
      for (int64_t channel = first; channel < first + width; channel++)
        mean += pivot_of(at, pixels, c, channel) + total(0, channel);
      mean /= (double)width;
      for (int64_t channel = first; channel < first + width; channel++) {
        const double shift = total(0, channel), distance = pivot_of(at, pixels, c, channel) + shift - mean;
        spread += std::max(0., total(1, channel) - shift * shift) + distance * distance;
      }
      out[item] = (float)(spread / (double)width);
      out[n * groups + item] = (float)mean;
    }
  }
}

}  // namespace
