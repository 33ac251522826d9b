// One convolution by the kernel that was asked for, once that is known to be able to.

#pragma once

#include <cstdint>
#include <vector>

#include "check.h"
#include "depthwise.h"
#include "few_channels.h"
#include "interface.h"
#include "kernel.h"
#include "product.h"
#include "slide.h"
#include "winograd.h"

namespace {

using Packed = FxpassesConstant;

// Whether a kernel can do the convolution.
void check_kernel(const Geometry& g, const Kernel& kernel, const float* other) {
  require(kernel.kind != Kind::DEPTHWISE || (g.groups == g.c && g.k == g.c && g.c >= VL && !other),
          "a depthwise convolution");
  require(kernel.kind != Kind::FEW_CHANNELS || (g.groups == 1 && g.dw == 1 && !kernel.single_pixel),
          "taps end to end need one group without dilation, and several pixels at a time");
  require(kernel.kind != Kind::WINOGRAD || (g.groups == 1 && g.kh * g.kw == 9 && g.kh == 3 && g.sh * g.sw == 1 &&
                                            g.dh * g.dw == 1 && g.c % VL == 0),
          "3 x 3 taps end to end, stride 1, one group, and channels that fill vectors");
}

// The same of one group, but of all where each channel has a filter.
Geometry of_one_group(Geometry g, const Kernel& kernel) {
  if (kernel.kind != Kind::DEPTHWISE) g.c /= g.groups, g.k /= g.groups;
  return g;
}

// `g` is `of_one_group`.
void check_packed(const Packed& weight, const Geometry& g, const Kernel& kernel) {
  require(kernel.kind != Kind::SLIDING ||
              (g.kw == 3 && g.dw == 1 && (g.sw == 1 || g.sw == 2) && g.out_pixel % VL == 0 &&
               (g.k < VL ? g.c == g.k && VL % g.c == 0 : g.k % VL == 0)),
          "groups of three taps a row that fill vectors");
  const int64_t wide = kernel.width * VL;
  const int64_t wanted = kernel.kind == Kind::DEPTHWISE ? (g.kh * g.kw + 1) * g.c
                         : kernel.kind == Kind::SLIDING ? g.out_pixel * (g.kh * 3 * g.c + 1)
                         : kernel.kind == Kind::WINOGRAD
                             ? (g.k + wide - 1) / wide * wide * TAPS * (g.c + 1)
                             : (g.k + wide - 1) / wide * wide * g.groups * (g.kh * g.kw * g.c + 1);
  require(weight.count == wanted, "a weight packed for this convolution");
}

// One convolution. `image` is null where there is a `source`.
void run(Geometry g, const Kernel& kernel, const Activation& after, const float* image, const Source* source,
         const Packed& weight, const float* add, float* to, int threads) {
  if (g.n * g.oh * g.ow * g.k == 0) return;
  require(!source || (g.groups == 1 && g.kh * g.kw == 1 && !g.checked && kernel.is_blocked_product()),
          "only a product over single pixels gathers them");
  check_kernel(g, kernel, add);
  g = of_one_group(g, kernel);
  check_packed(weight, g, kernel);
  if (kernel.kind == Kind::DEPTHWISE) return depthwise(g, after, image, weight.floats, to, threads);
  if (kernel.kind == Kind::FEW_CHANNELS) return few_channels(g, kernel, after, image, weight.floats, add, to, threads);
  static thread_local std::vector<float> zeros;
  if ((int64_t)zeros.size() < g.c + VL) zeros.assign(g.c + VL, 0.f);
  if (kernel.kind == Kind::SLIDING)
    return sliding(g, after, image, zeros.data(), weight.floats, add, to, threads);
  if (kernel.kind == Kind::WINOGRAD)
    return winograd_for(kernel)(g, after, image, zeros.data(), weight.floats, add, to, threads);
  product_for(kernel)(g, after, image, zeros.data(), weight.floats, add, to, source, threads);
}

}  // namespace
