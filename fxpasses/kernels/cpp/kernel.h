// A kernel, from the number by which the operator is told: kernel.py has the table.

#pragma once

#include <cstdint>
#include <string>

#include "check.h"

namespace {

using std::int64_t;

enum class Kind { DEPTHWISE, PRODUCT, SLIDING, FEW_CHANNELS, WINOGRAD };

// Which loops compute a convolution. The operator takes a number, of which kernel.py has a table.
struct Kernel {
  Kind kind;
  int64_t width;      // vectors of output channels that are computed at a time
  bool single_pixel;  // one pixel at a time
  bool planar;        // reads an image plane by plane
  int64_t code;

  bool is_blocked_product() const { return kind == Kind::PRODUCT && !single_pixel; }
};

// The one place that knows what the digits of the number mean.
Kernel kernel_of(int64_t code) {
  if (code == 0) return {Kind::DEPTHWISE, 1, false, false, code};
  if (code == 20) return {Kind::SLIDING, 1, false, false, code};
  if (31 <= code && code <= 34) return {Kind::WINOGRAD, code - 30, false, false, code};
  const int64_t memory = code / 100, pixels = code % 100 / 10, width = code % 10;
  const bool is_known = pixels == 0 ? 1 <= width && width <= 4 : pixels == 1 && (width == 1 || width == 4);
  if (code <= 0 || memory > 2 || !is_known) refuse("no kernel " + std::to_string(code));
  return {memory == 0 ? Kind::PRODUCT : Kind::FEW_CHANNELS, width, pixels == 1, memory == 2, code};
}

}  // namespace
