// What follows a convolution, vector by vector: an activation, made of e to the x and the error function.
//
//     silu x / (1 + e^-x)    gelu x / 2 * (1 + erf(x / sqrt 2))    hardswish x * clamp(x + 3, 0, 6) / 6
//     leaky_relu max(x, 0) + low * min(x, 0)

#pragma once

#include <cstdint>

#include "vectors.h"

namespace {

using std::int64_t;

// e to the x as 2^n times 2^f, to 1e-7 and what rounding of x * log2(e) adds: 2e-8 times x. The polynomial is the
// one of degree 5 with the least error for f from -0.5 to 0.5 that gives one for zero.
inline Vec exponential(Vec x) {
  constexpr float LOG2_E = 1.44269504f;
#if defined(__AVX512F__)
  Vec n = (Vec)_mm512_roundscale_ps((__m512)(x * LOG2_E), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  x = below(88.9f, above(-87.3f, x));  // infinity above
  Vec n = (x * LOG2_E + 12582912.f) - 12582912.f;
#endif
  Vec f = fma(x, splat(LOG2_E), -n);
  Vec p = splat(1.326472749e-3f);
  p = fma(p, f, splat(9.671512642e-3f));
  p = fma(p, f, splat(5.550733742e-2f));
  p = fma(p, f, splat(2.402224209e-1f));
  p = fma(p, f, splat(6.931469776e-1f));
  p = fma(p, f, splat(1.f));
#if defined(__AVX512F__)
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return p * (Vec)((__builtin_convertvector(n, Ints) + 127) << 23);
#endif
}

// The error function, to 1e-7: a quotient of polynomials (the coefficients are those of Eigen's).
inline Vec error_function(Vec x) {
  x = below(4.f, above(-4.f, x));
  Vec s = x * x;
  Vec p = splat(-2.72614225801306e-10f);
  p = fma(p, s, splat(2.77068142495902e-08f));
  p = fma(p, s, splat(-2.10102402082508e-06f));
  p = fma(p, s, splat(-5.69250639462346e-05f));
  p = fma(p, s, splat(-7.34990630326855e-04f));
  p = fma(p, s, splat(-2.95459980854025e-03f));
  p = fma(p, s, splat(-1.60960333262415e-02f));
  Vec q = splat(-1.45660718464996e-05f);
  q = fma(q, s, splat(-2.13374055278905e-04f));
  q = fma(q, s, splat(-1.68282697438203e-03f));
  q = fma(q, s, splat(-7.37332916720468e-03f));
  q = fma(q, s, splat(-1.42647390514189e-02f));
  return x * p / q;
}

constexpr float SIXTH = 1.f / 6.f;  // a division takes as long as ten products

struct Activation {
  int64_t kind;
  float low, high;

  bool is_clamp() const { return kind <= 1; }  // or nothing, which is one without limits

  // Calls `use` with a function of a vector, so that loops inside `use` do not ask again which it is.
  template <class Use>
  __attribute__((always_inline)) inline void apply(const Use& use) const {
    const float l = low, h = high;
    switch (kind) {
      case 1: return use([l, h](Vec x) { return below(h, above(l, x)); });                         // clamp
      case 2: return use([](Vec x) { return x / (1.f + exponential(-x)); });                       // silu
      case 3: return use([](Vec x) { return x * (below(6.f, above(0.f, x + 3.f)) * SIXTH); });     // hardswish
      case 4: return use([](Vec x) { return 1.f / (1.f + exponential(-x)); });                     // sigmoid
      case 5: return use([](Vec x) { return below(6.f, above(0.f, x + 3.f)) * SIXTH; });           // hardsigmoid
      case 6: return use([](Vec x) { return 0.5f * x * (1.f + error_function(x * 0.70710678f)); });  // gelu
      case 7: return use([l](Vec x) { return above(0.f, x) + l * below(0.f, x); });                // leaky_relu
      default: return use([](Vec x) { return x; });
    }
  }
};

}  // namespace
