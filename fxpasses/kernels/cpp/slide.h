// Groups of few channels with three taps a row, one or two vectors of output channels at a time.
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

// P pixels of a row for NV vectors of output channels, three taps a row: what is read of the image serves all taps
// that it falls under. The filters of each vector are `panel` floats apart. `narrow`: there are several groups in a
// vector, else a group is NV vectors or more.
template <int P, int NV, int S, bool narrow>
__attribute__((always_inline)) inline void slide(const Geometry& g, const Activation& activation, const float* sample, const float* zeros,
                  const float* weight, int64_t panel, const float* other, float* out, int64_t top, int64_t side,
                  int rows) {
  constexpr int ACROSS = (P - 1) * S + 3;
  Vec sum[P][NV], total[P][NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; v++) {
    const Vec bias = load(weight + v * panel);
#pragma GCC unroll 32
    for (int q = 0; q < P; q++) sum[q][v] = bias;
  }
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
      Vec taps[3][NV];
#pragma GCC unroll 4
      for (int j = 0; j < 3; j++)
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) taps[j][v] = load(weight + v * panel + (j * g.c + c) * VL);
#pragma GCC unroll 32
      for (int x = 0; x < ACROSS; x++) {
        const Vec value = narrow ? of_groups(load(at[x]), lanes) : splat(at[x][c]);
#pragma GCC unroll 32
        for (int q = 0; q < P; q++)
          if (x - q * S >= 0 && x - q * S < 3)
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) sum[q][v] = fma(value, taps[x - q * S][v], sum[q][v]);
      }
      lanes += 1;
    }
  }
  carry(sum, total);
  finish<P, NV>(total, activation, other, out, g.out_pixel, rows, NV * VL);
}

// OF_A_ROW: how many pixels stay in registers beside 1 or 2 vectors of output channels and three taps of each.
#if defined(__AVX512F__)
constexpr int OF_A_ROW[] = {0, 14, 7};
#else
constexpr int OF_A_ROW[] = {0, 12, 4};
#endif

// How many vectors of output channels are computed at a time. `g` is of one group.
int64_t vectors_together(const Geometry& g) { return g.k % (2 * VL) == 0 ? 2 : 1; }

// One row of results for `p`th of the vectors of output channels that are computed together. `g` is of one group,
// `sample` one image of the batch.
template <int NV, int S, bool narrow>
void row_of_groups(const Geometry& g, const Activation& activation, const float* sample, const float* zeros,
                   const float* weight, const float* other, float* out, int64_t top, int64_t p) {
  constexpr int P = OF_A_ROW[NV];
  const int64_t first = p * NV * VL, panel = (g.kh * 3 * g.c + 1) * VL;
  sample += narrow ? first : first / g.k * g.c;
  weight += p * NV * panel;
  auto few = [&](auto count, int64_t x) {
    const int64_t place = x * g.out_pixel + first;
    slide<decltype(count)::value, NV, S, narrow>(g, activation, sample, zeros, weight, panel,
                                                 other ? other + place : nullptr, out + place, top, x * S - g.pw,
                                                 (int)std::min<int64_t>(P, g.ow - x));
  };
  int64_t x = 0;
  for (; g.ow - x > P / 2; x += P) few(Constant<P>{}, x);
  if (x < g.ow) few(Constant<P / 2>{}, x);
}

using RowOfGroups = decltype(&row_of_groups<1, 1, true>);

// `g` is of one group.
RowOfGroups row_of_groups_for(const Geometry& g) {
  if (g.k < VL) return g.sw == 1 ? row_of_groups<1, 1, true> : row_of_groups<1, 2, true>;
  if (vectors_together(g) == 1) return g.sw == 1 ? row_of_groups<1, 1, false> : row_of_groups<1, 2, false>;
  return g.sw == 1 ? row_of_groups<2, 1, false> : row_of_groups<2, 2, false>;
}

// `g` is of one group.
void sliding(const Geometry& g, const Activation& activation, const float* image, const float* zeros,
             const float* weight, const float* other, float* out, int threads) {
  const int64_t panels = g.out_pixel / VL / vectors_together(g), rows = g.n * g.oh, line = g.ow * g.out_pixel;
  const RowOfGroups one = row_of_groups_for(g);
  auto some = [&](int64_t p, int64_t from, int64_t to) {
    for (int64_t row = from; row < to; row++)
      one(g, activation, image + row / g.oh * g.h * g.w * g.image_pixel, zeros, weight,
          other ? other + row * line : nullptr, out + row * line, row % g.oh * g.sh - g.ph, p);
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
