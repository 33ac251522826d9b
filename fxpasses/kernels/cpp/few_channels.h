// A convolution over an image of few channels: the taps of a row lie end to end, so they are read as one line.
//
//     pixel by pixel   rgb rgb rgb rgb           a 3x3 filter reads three lines of 9 numbers,
//     plane by plane   rrrr  gggg  bbbb          or nine of 3; the next pixel's begin `step` numbers further

#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "blocks.h"
#include "check.h"
#include "geometry.h"
#include "kernel.h"
#include "work.h"

namespace {

// A block over the taps of `lines`, each of which holds them for all pixels: those of the next pixel are `Q` floats
// further (`step` where Q is zero).
template <int R, int NV, int Q>
inline void block_of_lines(const Activation& activation, const float* const* lines, int64_t count, int64_t taps,
                           int64_t step, const float* weight, const float* other, float* out, int64_t out_pixel,
                           int rows, int64_t left) {
  if (Q) step = Q;
  Vec sum[R][NV], total[R][NV];
  begin(sum, weight);
  begin(total, nullptr);
  fetch<NV>(out, other, out_pixel, rows, left);
  weight += NV * VL;
  int64_t added = 0;
  for (int64_t l = 0; l < count; l++) {
    const float* line = lines[l];
    if (added + taps > TOGETHER) {
      added = 0;
      carry(sum, total);
    }
    added += taps;
    weight = multiply<0, R, NV>(sum, weight, taps, [&](int r, int64_t tap) { return line[r * step + tap]; });
  }
  carry(sum, total);
  finish<R, NV>(total, activation, other, out, out_pixel, rows, left);
}

// Memory of one thread for `row_of_few`.
struct Scratch {
  std::vector<const float*> lines;
  std::vector<float> copies, zeros;
};

// A row of results over an image of few channels, which lies pixel by pixel or, `planar`, plane by plane. What a
// block reads at a border is copied with zeros beside it. `image` is one image of the batch.
template <int R, int NV>
void row_of_few(const Geometry& g, const Activation& activation, const float* image, bool planar, const float* weight,
                const float* other, float* out, int64_t top, Scratch& scratch) {
  constexpr int64_t NR = NV * VL;
  const int64_t pixel = planar ? 1 : g.c, planes = planar ? g.c : 1;
  const int64_t count = planes * g.kh, taps = g.kw * pixel, step = g.sw * pixel, row = g.w * pixel;
  const int64_t panels = (g.k + NR - 1) / NR, panel = (count * taps + 1) * NR, blocks = (g.ow + R - 1) / R;
  const int64_t across = (R - 1) * g.sw + g.kw, span = across * pixel;
  auto run_block = step == 1   ? block_of_lines<R, NV, 1>
                   : step == 2 ? block_of_lines<R, NV, 2>
                   : step == 4 ? block_of_lines<R, NV, 4>
                               : block_of_lines<R, NV, 0>;
  scratch.lines.resize(blocks * count), scratch.copies.resize(blocks * count * span), scratch.zeros.resize(span);
  for (int64_t b = 0; b < blocks; b++) {
    const int64_t side = b * R * g.sw - g.pw;
    const int64_t start = std::clamp<int64_t>(side, 0, g.w), stop = std::clamp<int64_t>(side + across, start, g.w);
    for (int64_t l = 0; l < count; l++) {
      const int64_t y = top + l % g.kh * g.dh;
      const float*& line = scratch.lines[b * count + l];
      if ((uint64_t)y >= (uint64_t)g.h) {
        line = scratch.zeros.data();
        continue;
      }
      const float* from = image + (l / g.kh * g.h + y) * row;
      if (stop - start == across) {
        line = from + side * pixel;
        continue;
      }
      float* copy = scratch.copies.data() + (b * count + l) * span;
      std::memset(copy, 0, span * sizeof(float));
      std::memcpy(copy + (start - side) * pixel, from + start * pixel, (stop - start) * pixel * sizeof(float));
      line = copy;
    }
  }
  for (int64_t p = 0; p < panels; p++)
    for (int64_t b = 0; b < blocks; b++) {
      const int64_t place = b * R * g.out_pixel + p * NR;
      run_block(activation, scratch.lines.data() + b * count, count, taps, step, weight + p * panel,
                other ? other + place : nullptr, out + place, g.out_pixel, (int)std::min<int64_t>(R, g.ow - b * R),
                g.k - p * NR);
    }
}

using RowOfFew = decltype(&row_of_few<PIXELS[1], 1>);

RowOfFew row_of_few_for(const Kernel& kernel) {
  switch (kernel.width) {
    case 1: return row_of_few<PIXELS[1], 1>;
    case 2: return row_of_few<PIXELS[2], 2>;
    case 3: return row_of_few<PIXELS[3], 3>;
    case 4: return row_of_few<PIXELS[4], 4>;
    default: refuse("no kernel " + std::to_string(kernel.code));
  }
}

void few_channels(const Geometry& g, const Kernel& kernel, const Activation& activation, const float* image,
                  const float* weight, const float* other, float* out, int threads) {
  const RowOfFew one = row_of_few_for(kernel);
  const int64_t row = g.ow * g.out_pixel, sample = g.h * g.w * g.c;
  Work work(g.n * g.oh, threads);
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch;
    work.share([&](int64_t low, int64_t high) {
      for (int64_t at = low; at < high; at++)
        one(g, activation, image + at / g.oh * sample, kernel.planar, weight,
            other ? other + at * row : nullptr, out + at * row, at % g.oh * g.sh - g.ph, scratch);
    });
  }
}

}  // namespace
