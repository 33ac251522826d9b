// Any convolution as a product: out[pixel] = bias + sum over taps of image[pixel's place under the tap] * filter[tap].
//
// A tap that falls on padding is left out or reads zeros. Threads share blocks of pixels and walk over all panels of
// output channels, while the pixels are near; where there are more filters than pixels, they share panels too.

#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <string>

#include "check.h"
#include "gather.h"
#include "kernel.h"
#include "memory.h"
#include "panels.h"
#include "work.h"

namespace {

// The same product as `product`'s, over pixels that `source` gathers.
template <int R, int NV>
void gathered_product(const Geometry& g, const Activation& activation, const Source& source, const float* weight,
                      const float* other, float* out, int threads) {
  constexpr int64_t NR = NV * VL, NEAR = 16384;
  const int64_t panels = (g.k + NR - 1) / NR, panel = (g.c + 1) * NR;
  const int64_t pixels = g.n * g.oh * g.ow, blocks = (pixels + R - 1) / R;
  const bool weights_stay = g.c * g.k > pixels * g.c || blocks < 8 * threads;
  const int64_t together = std::max<int64_t>(1, NEAR / (R * g.c));
  Geometry line = g;
  line.n = line.h = line.oh = line.sh = line.sw = 1, line.w = line.ow = pixels;
  line.in_line = true;
  // All pixels for everyone, or those at hand for each thread.
  const int64_t share = weights_stay ? 0 : together * R * g.c;
  const Floats space(weights_stay ? pixels * g.c : share * threads);
  float* const memory = space.get();
  auto some = [&](int64_t p, int64_t from, int64_t to, const float* near, int64_t start) {
    const Panel one{near,   nullptr,      weight + p * panel, other ? other + p * NR : nullptr, out + p * NR,
                    pixels, g.k - p * NR, start};
    blocks_of_panel<R, NV>(line, activation, one, from, to);
  };
  Work work(weights_stay ? panels * blocks : blocks, threads);
#pragma omp parallel num_threads(threads)
  {
    const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
    if (weights_stay) {
      const int64_t from = pixels * me / all;
      source.gather(g, from, pixels * (me + 1) / all, memory + from * g.c);
#pragma omp barrier
      work.share([&](int64_t low, int64_t high) {
        by_panels(low, high, blocks, [&](int64_t p, int64_t from, int64_t to) { some(p, from, to, memory, 0); });
      });
    } else {
      float* near = memory + share * me;
      work.share([&](int64_t low, int64_t high) {
        for (int64_t from = low; from < high; from += together) {
          const int64_t to = std::min(high, from + together);
          source.gather(g, from * R, std::min(pixels, to * R), near);
          for (int64_t p = 0; p < panels; p++) some(p, from, to, near, from * R);
        }
      });
    }
  }
}

template <int R, int NV>
void product(const Geometry& g, const Activation& activation, const float* image, const float* zeros,
             const float* weight, const float* other, float* out, const Source* source, int threads) {
  if constexpr (R > 1) {  // one pixel at a time gathers none (dispatch.h)
    if (source) return gathered_product<R, NV>(g, activation, *source, weight, other, out, threads);
  }
  constexpr int64_t NR = NV * VL, NEAR = 16384;  // floats of an image that stay near while all panels pass
  const int64_t in_group = (g.k + NR - 1) / NR, panels = in_group * g.groups;
  const int64_t reduced = g.kh * g.kw * g.c, panel = (reduced + 1) * NR;
  const int64_t pixels = g.n * g.oh * g.ow, blocks = (pixels + R - 1) / R;
  const int64_t together = std::max<int64_t>(1, NEAR / (R * g.image_pixel * g.sh * g.sw));
  const bool weights_stay = reduced * g.k * g.groups > pixels * g.image_pixel || blocks < 8 * threads;
  auto some = [&](int64_t p, int64_t from, int64_t to) {
    const int64_t group = p / in_group, within = p % in_group * NR, place = group * g.k + within;
    const Panel one{image + group * g.c, zeros,  weight + p * panel, other ? other + place : nullptr,
                    out + place,         pixels, g.k - within};
    blocks_of_panel<R, NV>(g, activation, one, from, to);
  };
  Work work(weights_stay ? panels * blocks : blocks, threads);
#pragma omp parallel num_threads(threads)
  work.share([&](int64_t low, int64_t high) {
    if (weights_stay) {
      by_panels(low, high, blocks, some);
    } else {
      for (int64_t from = low; from < high; from += together)
        for (int64_t p = 0; p < panels; p++) some(p, from, std::min(high, from + together));
    }
  });
}

using Product = decltype(&product<PIXELS[1], 1>);

Product product_for(const Kernel& kernel) {
  if (kernel.single_pixel) return kernel.width == 1 ? product<1, 1> : product<1, 4>;
  switch (kernel.width) {
    case 1: return product<PIXELS[1], 1>;
    case 2: return product<PIXELS[2], 2>;
    case 3: return product<PIXELS[3], 3>;
    case 4: return product<PIXELS[4], 4>;
    default: refuse("no kernel " + std::to_string(kernel.code));
  }
}

// A product over the single pixels of an image, by one thread.
template <int R, int NV>
void product_of_pixels(const Geometry& g, const Activation& activation, const float* image, const float* weight,
                       const float* other, float* out, int64_t pixels, bool near) {
  constexpr int64_t NR = NV * VL, NEAR = 16384;
  const int64_t panels = (g.k + NR - 1) / NR, panel = (g.c + 1) * NR, blocks = (pixels + R - 1) / R;
  const int64_t together = std::max<int64_t>(1, NEAR / (R * g.image_pixel));
  Geometry line = g;
  line.n = line.h = line.oh = 1, line.w = line.ow = pixels;
  for (int64_t from = 0; from < blocks; from += together)
    for (int64_t p = 0; p < panels; p++) {
      const Panel one{image,      nullptr, weight + p * panel, other ? other + p * NR : nullptr,
                      out + p * NR, pixels,  g.k - p * NR,       0,
                      near};
      blocks_of_panel<R, NV>(line, activation, one, from, std::min(blocks, from + together));
    }
}

using Pixels = decltype(&product_of_pixels<PIXELS[1], 1>);

Pixels product_of_pixels_for(const Kernel& kernel) {
  switch (kernel.width) {
    case 1: return product_of_pixels<PIXELS[1], 1>;
    case 2: return product_of_pixels<PIXELS[2], 2>;
    case 3: return product_of_pixels<PIXELS[3], 3>;
    case 4: return product_of_pixels<PIXELS[4], 4>;
    default: refuse("no kernel over single pixels: " + std::to_string(kernel.code));
  }
}

}  // namespace
