// One filter a channel: out[pixel][c] = bias[c] + sum over taps of image[its place][c] * filter[tap][c].
//
//     taps of pixel q      q0: a b c             what is read of a row serves all P pixels
//     (three a row)        q1:   a b c           whose taps it falls under
//                          q2:     a b c
//     read of the row          0 1 2 3 4

#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>

#include "activations.h"
#include "geometry.h"
#include "vectors.h"
#include "work.h"

namespace {

// P pixels of a row. KW and S are zero where the sizes are to be read from `g`; `checked`: taps may fall on padding
// to the left or right.
template <int P, int KW, int S, bool checked>
inline void pixels(const Geometry& g, const Activation& activation, const float* image, const float* weight,
                   float* out, int64_t top, int64_t side, int64_t from, int64_t to) {
  for (int64_t c = from; c < to; c += VL) {
    const int64_t at = std::min(c, g.c - VL);  // the last vector may overlap the one before
    Vec sum[P];
    const Vec bias = load(weight + g.kh * g.kw * g.c + at);
    for (int q = 0; q < P; q++) sum[q] = bias;
    for (int64_t i = 0; i < g.kh; i++) {
      const int64_t y = top + i * g.dh;
      if ((uint64_t)y >= (uint64_t)g.h) continue;
      const float* row = image + y * g.w * g.c + at;
      const float* filter = weight + i * g.kw * g.c + at;
      if constexpr (KW > 0) {
        Vec taps[KW];
        for (int j = 0; j < KW; j++) taps[j] = load(filter + j * g.c);
#pragma GCC unroll 32
        for (int x = 0; x < (P - 1) * S + KW; x++) {
          if (checked && (uint64_t)(side + x) >= (uint64_t)g.w) continue;
          const Vec value = load(row + (side + x) * g.c);
#pragma GCC unroll 8
          for (int q = 0; q < P; q++)
            if (x - q * S >= 0 && x - q * S < KW) sum[q] = fma(value, taps[x - q * S], sum[q]);
        }
      } else {
        for (int64_t j = 0; j < g.kw; j++) {
          const Vec tap = load(filter + j * g.c);
          for (int q = 0; q < P; q++) {
            const int64_t x = side + q * g.sw + j * g.dw;
            if (!checked || (uint64_t)x < (uint64_t)g.w) sum[q] = fma(load(row + x * g.c), tap, sum[q]);
          }
        }
      }
    }
    activation.apply([&](auto activated) {
      for (int q = 0; q < P; q++) store(out + q * g.c + at, activated(sum[q]));
    });
  }
}

// One row of results, over channels `from` to `to`. `sample` is one image of the batch.
template <int P, int KW, int S>
inline void depthwise_row(const Geometry& g, const Activation& activation, const float* sample, const float* weight,
                          float* line, int64_t top, int64_t from, int64_t to) {
  const int64_t reach = (g.kw - 1) * g.dw;
  auto few = [&](auto count, int64_t x) {
    constexpr int N = decltype(count)::value;
    const int64_t side = x * g.sw - g.pw;
    if (side < 0 || side + (N - 1) * g.sw + reach >= g.w)
      pixels<N, KW, S, true>(g, activation, sample, weight, line + x * g.c, top, side, from, to);
    else
      pixels<N, KW, S, false>(g, activation, sample, weight, line + x * g.c, top, side, from, to);
  };
  int64_t x = 0;
  for (; x + P <= g.ow; x += P) few(Constant<P>{}, x);
  for (; x + 2 <= g.ow; x += 2) few(Constant<2>{}, x);
  if (x < g.ow) few(Constant<1>{}, x);
}

using Row = void (*)(const Geometry&, const Activation&, const float*, const float*, float*, int64_t, int64_t, int64_t);

Row depthwise_row_for(const Geometry& g) {
  const int64_t key = g.dw == 1 && g.sw <= 2 ? g.kw * 10 + g.sw : 0;
  switch (key) {
    case 31: return depthwise_row<7, 3, 1>;
    case 32: return depthwise_row<7, 3, 2>;
    case 51: return depthwise_row<7, 5, 1>;
    case 52: return depthwise_row<7, 5, 2>;
    case 71: return depthwise_row<7, 7, 1>;
    default: return depthwise_row<7, 0, 0>;
  }
}

void depthwise(const Geometry& g, const Activation& activation, const float* image, const float* weight, float* out,
               int threads) {
  const int64_t rows = g.n * g.oh;
  // Few rows cannot be shared out evenly, but parts of rows can.
  const int64_t vectors = (g.c + VL - 1) / VL, parts = rows < 16 * threads && vectors >= 2 * threads ? threads : 1;
  const Row one = depthwise_row_for(g);
  Work work(rows * parts, threads);
#pragma omp parallel num_threads(threads)
  work.share([&](int64_t low, int64_t high) {
    for (int64_t item = low; item < high; item++) {
      const int64_t row = item / parts, part = item % parts, n = row / g.oh, top = row % g.oh * g.sh - g.ph;
      const int64_t from = vectors * part / parts * VL, to = std::min(g.c, vectors * (part + 1) / parts * VL);
      one(g, activation, image + n * g.h * g.w * g.c, weight, out + row * g.ow * g.c, top, from, to);
    }
  });
}

}  // namespace
