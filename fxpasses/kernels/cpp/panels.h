// Panels: the output channels that a block computes at a time, and the blocks of pixels that pass under one.
//
//              panel 0    panel 1               a panel's filters: its bias, then taps by input channels,
//            +----------+----------+            NV vectors each
//     R      |  block   |  block   |
//     pixels +----------+----------+
//     R      |  block   |  block   |
//     pixels +----------+----------+

#pragma once

#include <algorithm>
#include <cstdint>

#include "blocks.h"
#include "geometry.h"

namespace {

// `WIDE`: how many vectors of output channels the filters are packed for, of which the first NV are wanted.
template <int R, int NV, int WIDE = NV>
inline void block(const Geometry& g, const Activation& activation, const float* image, const float* zeros,
                  const float* weight, const float* other, float* out, int64_t first, int rows, int64_t left,
                  bool near = false) {
  constexpr int64_t NR = WIDE * VL;
  constexpr uint32_t ALL = (1u << R) - 1;
  Vec sum[R][NV], total[R][NV];
  begin(sum, weight);
  const bool is_long = g.kh * g.kw * g.c > TOGETHER;
  if (is_long) begin(total, nullptr);
  int64_t added = 0;
  weight += NR;
  if (!near) fetch<NV>(out, other, g.out_pixel, rows, left);
  const float *corner[R], *at[R];
  int64_t top[R], side[R];
  if (g.in_line) {
    for (int r = 0; r < R; r++) corner[r] = image + (first + std::min(r, rows - 1)) * g.image_pixel;
  } else {
    int64_t x = first % g.ow, y = first / g.ow % g.oh, n = first / g.ow / g.oh;
    for (int r = 0; r < R; r++) {
      top[r] = y * g.sh - g.ph;
      side[r] = x * g.sw - g.pw;
      corner[r] = image + ((n * g.h + top[r]) * g.w + side[r]) * g.image_pixel;
      if (r + 1 < rows && ++x == g.ow) {
        x = 0;
        if (++y == g.oh) y = 0, n++;
      }
    }
  }
  for (int64_t i = 0; i < g.kh; i++)
    for (int64_t j = 0; j < g.kw; j++) {
      const int64_t step = (i * g.dh * g.w + j * g.dw) * g.image_pixel;
      uint32_t outside = 0;  // a bit for each pixel
      for (int r = 0; r < R; r++) {
        const bool inside = !g.checked || ((uint64_t)(top[r] + i * g.dh) < (uint64_t)g.h &&
                                           (uint64_t)(side[r] + j * g.dw) < (uint64_t)g.w);
        at[r] = inside ? corner[r] + step : zeros;
        outside |= (uint32_t)!inside << r;
      }
      if (outside == ALL) {
        weight += g.c * NR;
        continue;
      }
      for (int64_t from = 0; from < g.c; from += TOGETHER) {
        const int64_t to = std::min(g.c, from + TOGETHER);
        if (added + to - from > TOGETHER) {
          added = 0;
          carry(sum, total);
        }
        added += to - from;
        auto add = [&](auto low, auto high) __attribute__((always_inline)) {
          weight = multiply<low, high, WIDE>(sum, weight, to - from, [&](int r, int64_t c) { return at[r][from + c]; });
        };
        // At the ends of a row, the first or the last pixel's tap falls on padding.
        constexpr bool ENDS = R > 1 && NV > 1;
        if (ENDS && outside == 1)
          add(Constant<ENDS>{}, Constant<R>{});
        else if (ENDS && outside == 1u << (R - 1))
          add(Constant<0>{}, Constant<R - ENDS>{});
        else
          add(Constant<0>{}, Constant<R>{});
      }
    }
  if (is_long) {
    carry(sum, total);
  } else {
    if (is_whole<R, NV>(rows, left) && activation.is_clamp())
      return finish_whole(sum, activation, other, out, g.out_pixel, left);
    keep(sum, total);
  }
  finish<R, NV>(total, activation, other, out, g.out_pixel, rows, left);
}

// What the blocks of one panel have in common.
struct Panel {
  const float *image, *zeros, *weight, *other;
  float* out;
  int64_t pixels, left;  // of the result, and its channels from this panel on
  int64_t start = 0;     // the pixel that lies at `image`
  bool near = false;     // whether the result is
};

// Blocks `from` to `to`. Over many channels of single pixels, several blocks take a part of the channels each before
// any takes the next, so that the filters of a part stay in the nearest cache.
template <int R, int NV, int WIDE>
void blocks_of(const Geometry& g, const Activation& activation, const Panel& panel, int64_t from, int64_t to) {
  constexpr int64_t MANY = 8;
  auto first_of = [&](int64_t b) { return b * R; };
  auto rows_of = [&](int64_t b) { return (int)std::min<int64_t>(R, panel.pixels - first_of(b)); };
  auto other_of = [&](int64_t b) { return panel.other ? panel.other + first_of(b) * g.out_pixel : nullptr; };
  auto out_of = [&](int64_t b) { return panel.out + first_of(b) * g.out_pixel; };
  if (R == 1 || !g.in_line || g.c <= TOGETHER) {
    for (int64_t b = from; b < to; b++)
      block<R, NV, WIDE>(g, activation, panel.image, panel.zeros, panel.weight, other_of(b), out_of(b),
                         first_of(b) - panel.start, rows_of(b), panel.left, panel.near);
    return;
  }
  Vec total[MANY][R][NV];
  const int64_t parts = (g.c + TOGETHER - 1) / TOGETHER;
  for (; from < to; from += MANY) {
    const int64_t end = std::min(to, from + MANY);
    for (int64_t part = 0; part < parts; part++) {
      const int64_t low = g.c * part / parts, high = g.c * (part + 1) / parts;
      for (int64_t b = from; b < end; b++) {
        const int rows = rows_of(b);
        const float* at[R];
        for (int r = 0; r < R; r++)
          at[r] = panel.image + (first_of(b) - panel.start + std::min(r, rows - 1)) * g.image_pixel;
        if (part + 1 == parts && !panel.near) fetch<NV>(out_of(b), other_of(b), g.out_pixel, rows, panel.left);
        Vec sum[R][NV];
        begin(sum, part == 0 ? panel.weight : nullptr);
        multiply<0, R, WIDE>(sum, panel.weight + (1 + low) * WIDE * VL, high - low,
                             [&](int r, int64_t c) { return at[r][low + c]; });
        if (part == 0)
          keep(sum, total[b - from]);
        else
          carry(sum, total[b - from]);
      }
    }
    for (int64_t b = from; b < end; b++)
      finish<R, NV>(total[b - from], activation, other_of(b), out_of(b), g.out_pixel, rows_of(b), panel.left);
  }
}

// The same for as many vectors as are left of the panel.
template <int R, int WIDE>
void blocks_of_panel(const Geometry& g, const Activation& activation, const Panel& panel, int64_t from, int64_t to) {
  if constexpr (WIDE == 4) {
    if (panel.left <= VL) return blocks_of<R, 1, WIDE>(g, activation, panel, from, to);
    if (panel.left <= 2 * VL) return blocks_of<R, 2, WIDE>(g, activation, panel, from, to);
    if (panel.left <= 3 * VL) return blocks_of<R, 3, WIDE>(g, activation, panel, from, to);
  }
  blocks_of<R, WIDE, WIDE>(g, activation, panel, from, to);
}

}  // namespace
