// Groups of few channels with three taps a row, one vector of output channels at a time.
//
//     read of the row    0 1 2 3 4 ...           for each input channel of the group: the value read is
//     taps of pixel 0    a b c                   splat or, where several groups are in a vector, each group's
//     taps of pixel 1      a b c                 value laid over its lanes
//
// As in depthwise.h, what is read serves every tap that it falls under.

#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>

#include "blocks.h"
#include "geometry.h"
#include "work.h"

namespace {

// For each channel of a group, the lanes of a vector of channels that have it, for every group in the vector.
inline Vec of_groups(Vec value, Ints lanes) {
#if defined(__AVX512F__)
  return (Vec)_mm512_permutexvar_ps((__m512i)lanes, (__m512)value);
#else
  return (Vec)_mm256_permutevar8x32_ps((__m256)value, (__m256i)lanes);
#endif
}

// P pixels of a row for one vector of output channels, three taps a row: what is read of the image serves all taps
// that it falls under. `narrow`: there are several groups in a vector, else a group is one vector or more.
template <int P, int S, bool narrow>
inline void slide(const Geometry& g, const Activation& activation, const float* sample, const float* zeros,
                  const float* weight, const float* other, float* out, int64_t top, int64_t side, int rows) {
  constexpr int ACROSS = (P - 1) * S + 3;
  Vec sum[P][1], total[P][1];
  begin(sum, weight);
  begin(total, nullptr);
  weight += VL;
  int64_t added = 0;
  for (int64_t i = 0; i < g.kh; i++, weight += 3 * g.c * VL) {
    const int64_t y = top + i * g.dh;
    if ((uint64_t)y >= (uint64_t)g.h) continue;
    const float* row = sample + y * g.w * g.image_pixel;
    const float* at[ACROSS];
    for (int x = 0; x < ACROSS; x++)
      at[x] = (uint64_t)(side + x) < (uint64_t)g.w ? row + (side + x) * g.image_pixel : zeros;
    if (added + 3 * g.c > TOGETHER) {
      added = 0;
      carry(sum, total);
    }
    added += 3 * g.c;
    Ints lanes;
    for (int v = 0; v < VL; v++) lanes[v] = narrow ? v / (int)g.c * (int)g.c : 0;
    for (int64_t c = 0; c < g.c; c++) {
      Vec taps[3];
      for (int j = 0; j < 3; j++) taps[j] = load(weight + (j * g.c + c) * VL);
#pragma GCC unroll 32
      for (int x = 0; x < ACROSS; x++) {
        const Vec value = narrow ? of_groups(load(at[x]), lanes) : splat(at[x][c]);
#pragma GCC unroll 32
        for (int q = 0; q < P; q++)
          if (x - q * S >= 0 && x - q * S < 3) sum[q][0] = fma(value, taps[x - q * S], sum[q][0]);
      }
      lanes += 1;
    }
  }
  carry(sum, total);
  finish<P, 1>(total, activation, other, out, g.out_pixel, rows, VL);
}

// `g` is of one group.
template <int S, bool narrow>
void sliding(const Geometry& g, const Activation& activation, const float* image, const float* zeros,
             const float* weight, const float* other, float* out, int threads) {
  constexpr int P = PIXELS[1];
  const int64_t panels = g.out_pixel / VL, panel = (g.kh * 3 * g.c + 1) * VL, rows = g.n * g.oh;
  auto one = [&](int64_t p, int64_t row) {
    const float* sample = image + row / g.oh * g.h * g.w * g.image_pixel + (narrow ? p * VL : p * VL / g.k * g.c);
    const int64_t top = row % g.oh * g.sh - g.ph, place = row * g.ow * g.out_pixel + p * VL;
    const float* filters = weight + p * panel;
    auto few = [&](auto count, int64_t x) {
      const int64_t start = place + x * g.out_pixel;
      slide<decltype(count)::value, S, narrow>(g, activation, sample, zeros, filters, other ? other + start : nullptr,
                                               out + start, top, x * S - g.pw, (int)std::min<int64_t>(P, g.ow - x));
    };
    int64_t x = 0;
    for (; g.ow - x > P / 2; x += P) few(Constant<P>{}, x);
    if (x < g.ow) few(Constant<P / 2>{}, x);
  };
  auto some = [&](int64_t p, int64_t from, int64_t to) {
    for (int64_t row = from; row < to; row++) one(p, row);
  };
  const bool weights_stay = rows < 8 * threads;
  Work work(weights_stay ? panels * rows : rows, threads);
#pragma omp parallel num_threads(threads)
  work.share([&](int64_t low, int64_t high) {
    if (weights_stay) {
      by_panels(low, high, rows, some);
    } else {
      for (int64_t p = 0; p < panels; p++) some(p, low, high);
    }
  });
}

}  // namespace
