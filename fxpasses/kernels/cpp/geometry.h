// The sizes of a convolution: an image of h x w pixels and c channels gives oh x ow pixels and k channels.
//
//     oh = (h + 2 ph - dh (kh - 1) - 1) / sh + 1         s: stride, p: padding, d: dilation

#pragma once

#include <cstdint>

namespace {

using std::int64_t;

// Of one group: `c` input channels give `k`. Of the whole: `groups`; a pixel of the image has `image_pixel` floats.
struct Geometry {
  int64_t n, h, w, c, oh, ow, k, groups, kh, kw, sh, sw, ph, pw, dh, dw;
  int64_t image_pixel, out_pixel;
  bool checked;  // whether a tap may fall on padding
  bool in_line;  // whether pixel by pixel one is read for each result
};

// Sizes: k, groups, kh, kw, sh, sw, ph, pw, dh, dw; of the image: n, h, w, c.
Geometry geometry_of(const int64_t* sizes, int64_t n, int64_t h, int64_t w, int64_t c) {
  Geometry g{};
  g.n = n, g.h = h, g.w = w, g.c = c;
  g.k = sizes[0], g.groups = sizes[1], g.kh = sizes[2], g.kw = sizes[3], g.sh = sizes[4], g.sw = sizes[5];
  g.ph = sizes[6], g.pw = sizes[7], g.dh = sizes[8], g.dw = sizes[9];
  g.oh = (g.h + 2 * g.ph - g.dh * (g.kh - 1) - 1) / g.sh + 1;
  g.ow = (g.w + 2 * g.pw - g.dw * (g.kw - 1) - 1) / g.sw + 1;
  g.image_pixel = g.c, g.out_pixel = g.k;
  g.checked = g.ph > 0 || g.pw > 0;
  g.in_line = !g.checked && g.kh * g.kw * g.sh * g.sw == 1;
  return g;
}

// Of a window that passes over each channel. Its words: kh, kw, sh, sw, ph, pw, dh, dw.
Geometry window_of(const int64_t* words, int64_t n, int64_t h, int64_t w, int64_t c) {
  const int64_t sizes[] = {c, c, words[0], words[1], words[2], words[3], words[4], words[5], words[6], words[7]};
  return geometry_of(sizes, n, h, w, c);
}

}  // namespace
