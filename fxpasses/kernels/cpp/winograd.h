// Winograd's F(2x2, 3x3): a 3 x 3 convolution of stride 1 in 16 products over single pixels instead of 36 for each 2 x 2
// pixels of the result (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015).
//
//     4 x 4 pixels of the image --B'dB--> 16 numbers --times 16 filters, summed over channels--> 16 sums --A'sA--> 2 x 2
//
// The filters come transformed (convolution.py). The bias begins the sum that all four results contain once. A number
// of the image takes part in no result that is not under its taps, but an infinite one can leave NaN there where a
// direct sum has infinity, and transforms may overflow: results that are not finite are computed again, directly.

#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>

#include "activations.h"
#include "blocks.h"
#include "geometry.h"
#include "memory.h"
#include "work.h"

namespace {

constexpr int TAPS = 16;  // of a transformed tile or filter
// As TOGETHER, but shorter: what transforms add to the rounding is taken from that of the sums.
constexpr int64_t AT_ONCE = 64;

// The tiles of the result: 2 x 2 pixels each, less at the ends of rows and columns.
struct Tiles {
  int64_t across, down, count;

  explicit Tiles(const Geometry& g) : across((g.ow + 1) / 2), down((g.oh + 1) / 2), count(g.n * across * down) {}
};

// Where a tile is: its image of the batch, and the first pixel of its result.
struct Tile {
  int64_t n, y, x;

  Tile(const Tiles& tiles, int64_t which)
      : n(which / tiles.across / tiles.down), y(which / tiles.across % tiles.down * 2), x(which % tiles.across * 2) {}
};

// B'dB of one tile, VL channels at a time; number i goes to `to + i * step`.
inline void transform(const Geometry& g, const Tile& tile, const float* image, const float* zeros, float* to,
                      int64_t step) {
  const float* at[4][4];
  for (int64_t i = 0; i < 4; i++)
    for (int64_t j = 0; j < 4; j++) {
      const int64_t y = tile.y - g.ph + i, x = tile.x - g.pw + j;
      const bool inside = (uint64_t)y < (uint64_t)g.h && (uint64_t)x < (uint64_t)g.w;
      at[i][j] = inside ? image + ((tile.n * g.h + y) * g.w + x) * g.image_pixel : zeros;
    }
  for (int64_t c = 0; c < g.c; c += VL) {
    Vec half[4][4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      const Vec a = load(at[0][j] + c), b = load(at[1][j] + c), d = load(at[2][j] + c), e = load(at[3][j] + c);
      half[0][j] = a - d, half[1][j] = b + d, half[2][j] = d - b, half[3][j] = b - e;
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const Vec *row = half[i];
      float* const place = to + 4 * i * step + c;
      store(place, row[0] - row[2]);
      store(place + step, row[1] + row[2]);
      store(place + 2 * step, row[2] - row[1]);
      store(place + 3 * step, row[1] - row[3]);
    }
  }
}

// One of the 16 products: R tiles, of which `rows` are wanted, by NV vectors of output channels.
template <int R, int NV>
inline void product_of_tiles(const float* tiles, int64_t channels, int rows, const float* weight, float* to) {
  const float* at[R];
  for (int r = 0; r < R; r++) at[r] = tiles + std::min(r, rows - 1) * channels;
  Vec total[R][NV];
  const float* filter = weight + NV * VL;
  for (int64_t from = 0; from < channels; from += AT_ONCE) {
    Vec sum[R][NV];
    begin(sum, from == 0 ? weight : nullptr);
    filter = multiply<0, R, NV>(sum, filter, std::min(AT_ONCE, channels - from),
                                [&](int r, int64_t c) { return at[r][from + c]; });
    if (from == 0)
      keep(sum, total);
    else
      carry(sum, total);
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < NV; v++) store(to + (r * NV + v) * VL, total[r][v]);
}

// What a direct sum gives for one pixel of a tile, with filters that are taken back from the transformed ones.
template <int NV>
inline Vec direct(const Geometry& g, const Tile& tile, int64_t y, int64_t x, const float* image, const float* weight,
                  int v) {
  const int64_t step = (g.c + 1) * NV * VL;  // from one of the 16 to the next
  const auto transformed = [&](int i, int j, int64_t c) {
    return load(weight + (4 * i + j) * step + ((1 + c) * NV + v) * VL);
  };
  Vec sum = load(weight + 5 * step + v * VL);
  for (int64_t i = 0; i < 3; i++)
    for (int64_t j = 0; j < 3; j++) {
      const int64_t top = tile.y + y - g.ph + i, side = tile.x + x - g.pw + j;
      if ((uint64_t)top >= (uint64_t)g.h || (uint64_t)side >= (uint64_t)g.w) continue;
      const float* pixel = image + ((tile.n * g.h + top) * g.w + side) * g.image_pixel;
      const int row = i == 2 ? 3 : (int)i, column = j == 2 ? 3 : (int)j;
      for (int64_t c = 0; c < g.c; c++) {
        Vec tap = transformed(row, column, c);
        if (i == 1) tap -= transformed(2, column, c);
        if (j == 1) tap -= transformed(row, 2, c);
        if (i == 1 && j == 1) tap += transformed(2, 2, c);
        sum = fma(splat(pixel[c]), tap, sum);
      }
    }
  return sum;
}

// Whether all four of a vector's results are finite.
inline bool are_finite(const Vec (&result)[2][2]) {
  const Vec zero = (result[0][0] - result[0][0]) + (result[0][1] - result[0][1]) + (result[1][0] - result[1][0]) +
                   (result[1][1] - result[1][1]);
  const Ints unordered = zero != zero;
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)unordered, (__m512i)unordered) == 0;
#else
  return _mm256_testz_si256((__m256i)unordered, (__m256i)unordered);
#endif
}

// A'sA of `rows` tiles and `left` output channels, with what follows. `sums` has the 16 products of R tiles each.
template <int R, int NV>
inline void results(const Geometry& g, const Tiles& tiles, const Activation& activation, const float* sums,
                    int64_t first, int rows, int64_t left, const float* image, const float* weight, const float* other,
                    float* out) {
  constexpr int64_t STEP = R * NV * VL;
  activation.apply([=, &g, &tiles](auto activated) {
    for (int r = 0; r < rows; r++) {
      const Tile tile(tiles, first + r);
      const int down = tile.y + 1 < g.oh ? 2 : 1, across = tile.x + 1 < g.ow ? 2 : 1;
      const int64_t place = ((tile.n * g.oh + tile.y) * g.ow + tile.x) * g.out_pixel;
      for (int v = 0; v < NV && v * VL < left; v++) {
        const float* from = sums + (r * NV + v) * VL;
        Vec half[2][4], result[2][2];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
          const Vec a = load(from + j * STEP), b = load(from + (4 + j) * STEP), c = load(from + (8 + j) * STEP),
                    d = load(from + (12 + j) * STEP);
          half[0][j] = a + b + c, half[1][j] = b - c - d;
        }
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
          result[i][0] = half[i][0] + half[i][1] + half[i][2];
          result[i][1] = half[i][1] - half[i][2] - half[i][3];
        }
        if (__builtin_expect(!are_finite(result), 0))
          for (int i = 0; i < down; i++)
            for (int j = 0; j < across; j++) result[i][j] = direct<NV>(g, tile, i, j, image, weight, v);
        for (int i = 0; i < down; i++)
          for (int j = 0; j < across; j++) {
            const int64_t at = place + (i * g.ow + j) * g.out_pixel + v * VL;
            write(result[i][j], activated, other ? other + at : nullptr, out + at, left - v * VL);
          }
      }
    }
  });
}

// Threads share blocks of R tiles, whose transformed pixels stay near while all filters pass; where there are few
// tiles or more filters than pixels, all tiles are transformed first, and threads share panels of filters.
template <int R, int NV>
void winograd(const Geometry& g, const Activation& activation, const float* image, const float* zeros,
              const float* weight, const float* other, float* out, int threads) {
  constexpr int64_t NR = NV * VL, NEAR = 131072;  // floats of transformed pixels that stay near
  const Tiles tiles(g);
  const int64_t panels = (g.k + NR - 1) / NR, filter = (g.c + 1) * NR, blocks = (tiles.count + R - 1) / R;
  const bool weights_stay = g.k > 2 * tiles.count || blocks < 2 * threads;
  const int64_t together = weights_stay ? blocks : std::clamp<int64_t>(NEAR / (TAPS * R * g.c), 1, blocks);
  const int64_t share = TAPS * together * R * g.c, sums = TAPS * R * NR;
  const Floats space(share * (weights_stay ? 1 : threads) + sums * threads);
  auto read = [&](int64_t from, int64_t to, float* near, int64_t start) {
    for (int64_t which = from; which < to; which++)
      transform(g, Tile(tiles, which), image, zeros, near + (which - start) * g.c, together * R * g.c);
  };
  // Block `b` of one panel; tile `start` is the first at `near`.
  auto one = [&](int64_t p, int64_t b, const float* near, int64_t start, float* sum) {
    const float* filters = weight + p * TAPS * filter;
    const int rows = (int)std::min<int64_t>(R, tiles.count - b * R);
    for (int64_t tap = 0; tap < TAPS; tap++)
      product_of_tiles<R, NV>(near + (tap * together * R + b * R - start) * g.c, g.c, rows, filters + tap * filter,
                              sum + tap * R * NR);
    results<R, NV>(g, tiles, activation, sum, b * R, rows, g.k - p * NR, image, filters,
                   other ? other + p * NR : nullptr, out + p * NR);
  };
  Work work(weights_stay ? panels * blocks : blocks, threads, weights_stay ? 1 : together);
#pragma omp parallel num_threads(threads)
  {
    const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
    float* const sum = space.get() + sums * me;
    float* const near = space.get() + sums * threads + (weights_stay ? 0 : share * me);
    if (weights_stay) {
      read(tiles.count * me / all, tiles.count * (me + 1) / all, near, 0);
#pragma omp barrier
      work.share([&](int64_t low, int64_t high) {
        by_panels(low, high, blocks, [&](int64_t p, int64_t from, int64_t to) {
          for (int64_t b = from; b < to; b++) one(p, b, near, 0, sum);
        });
      });
    } else {
      work.share([&](int64_t low, int64_t high) {
        for (int64_t from = low; from < high; from += together) {
          const int64_t to = std::min(high, from + together);
          read(from * R, std::min(tiles.count, to * R), near, from * R);
          for (int64_t p = 0; p < panels; p++)
            for (int64_t b = from; b < to; b++) one(p, b, near, from * R, sum);
        }
      });
    }
  }
}

using Winograd = decltype(&winograd<PIXELS[1], 1>);

Winograd winograd_for(const Kernel& kernel) {
  switch (kernel.width) {
    case 1: return winograd<PIXELS[1], 1>;
    case 2: return winograd<PIXELS[2], 2>;
    case 3: return winograd<PIXELS[3], 3>;
    case 4: return winograd<PIXELS[4], 4>;
    default: refuse("no kernel " + std::to_string(kernel.code));
  }
}

}  // namespace
