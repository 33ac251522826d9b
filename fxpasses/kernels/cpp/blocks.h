// A block of sums that stays in registers: R pixels times NV vectors of output channels.
//
//                 filter[NV]                     for each tap and input channel:
//                +----+----+----+                    sum[r][v] += value of pixel r * filter[v]
//     value of 0 | sum[0][..]   |
//     value of 1 | sum[1][..]   |                `begin` with the bias, `multiply`, `carry` into totals, `finish`
//       ...      |     ...      |                with summand and activation.
//     value of R +----+----+----+

#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "activations.h"
#include "vectors.h"

namespace {

// PIXELS: how many stay in registers beside 1 to 4 vectors of output channels.
#if defined(__AVX512F__)
constexpr int PIXELS[] = {0, 14, 14, 8, 7};
#else
constexpr int PIXELS[] = {0, 12, 6, 4, 3};
#endif
// Long sums are made of shorter ones, as rounding grows with their length; more than this would cost time.
constexpr int64_t TOGETHER = 128;

// Fetches what a block is written to, and what is added, while the sums are made: storing to lines that are not near
// would stall at the end.
template <int NV>
inline void fetch(float* out, const float* other, int64_t step, int rows, int64_t left) {
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < NV; v++)
      if (v * VL < left) {
        __builtin_prefetch(out + r * step + v * VL, 1);
        if (other) __builtin_prefetch(other + r * step + v * VL);
      }
}

// Writes VL channels of one pixel, of which `have` are wanted.
template <class Activated>
inline void write(Vec value, const Activated& activated, const float* add, float* to, int64_t have) {
  if (have >= VL) return store(to, activated(add ? value + load(add) : value));
  float part[VL] = {};
  if (add) std::memcpy(part, add, have * sizeof(float));
  store(part, activated(value + load(part)));
  std::memcpy(to, part, have * sizeof(float));
}

// Writes a block of sums, of which `rows` pixels and `left` channels are wanted.
template <int R, int NV>
inline void finish(const Vec (&total)[R][NV], const Activation& activation, const float* other, float* out,
                   int64_t step, int rows, int64_t left) {
  activation.apply([=, &total](auto activated) {
    for (int r = 0; r < rows; r++) {
      float* to = out + r * step;
      const float* add = other ? other + r * step : nullptr;
      for (int v = 0; v < NV; v++) {
        const int64_t have = left - v * VL;
        if (have <= 0) break;
        write(total[r][v], activated, add ? add + v * VL : nullptr, to + v * VL, have);
      }
    }
  });
}

// The same for all pixels of a block, from registers, where nothing or a clamp follows: after short sums this is half
// of the work. All vectors are wanted, but with AVX-512 the last may be in part.
template <int R, int NV>
constexpr bool is_whole(int rows, int64_t left) {
#if defined(__AVX512F__)
  return rows == R && left > (NV - 1) * VL;
#else
  return rows == R && left >= NV * VL;
#endif
}

template <int R, int NV>
__attribute__((always_inline)) inline void finish_whole(const Vec (&sum)[R][NV], const Activation& activation,
                                                        const float* other, float* out, int64_t step, int64_t left) {
  constexpr float LIMIT = std::numeric_limits<float>::infinity();
  const float low = activation.kind ? activation.low : -LIMIT, high = activation.kind ? activation.high : LIMIT;
#if defined(__AVX512F__)
  const Some last = first(left - (NV - 1) * VL);
#endif
  const auto each = [&](const auto& value) __attribute__((always_inline)) {
#pragma GCC unroll 32
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) {
        const int64_t at = r * step + v * VL;
#if defined(__AVX512F__)
        if (v + 1 == NV)
          store(out + at, below(high, above(low, value(r, v, at))), last);
        else
#endif
          store(out + at, below(high, above(low, value(r, v, at))));
      }
  };
  if (!other) return each([&](int r, int v, int64_t) { return sum[r][v]; });
#if defined(__AVX512F__)
  each([&](int r, int v, int64_t at) { return sum[r][v] + (v + 1 == NV ? load(other + at, last) : load(other + at)); });
#else
  each([&](int r, int v, int64_t at) { return sum[r][v] + load(other + at); });
#endif
}

// The sums of a block stay in registers if every loop over them is unrolled. What they begin with: zeros where there
// is no bias.
template <int R, int NV>
__attribute__((always_inline)) inline void begin(Vec (&sum)[R][NV], const float* bias) {
#pragma GCC unroll 4
  for (int v = 0; v < NV; v++) {
    const Vec start = bias ? load(bias + v * VL) : Vec{};
#pragma GCC unroll 32
    for (int r = 0; r < R; r++) sum[r][v] = start;
  }
}

// Adds `count` products to those of pixels LOW to HIGH, of filters that are packed for WIDE vectors. Gives where the
// filters after these are.
template <int LOW, int HIGH, int WIDE, int R, int NV, class ValueOf>
__attribute__((always_inline)) inline const float* multiply(Vec (&sum)[R][NV], const float* weight, int64_t count,
                                                            const ValueOf& value_of) {
  for (int64_t term = 0; term < count; term++) {
    Vec filter[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) filter[v] = load(weight + v * VL);
    weight += WIDE * VL;
#pragma GCC unroll 32
    for (int r = LOW; r < HIGH; r++) {
      const Vec value = splat(value_of(r, term));
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) sum[r][v] = fma(value, filter[v], sum[r][v]);
    }
  }
  return weight;
}

// Adds them to the sums of which they are a part, and begins again with zeros.
template <int R, int NV>
__attribute__((always_inline)) inline void carry(Vec (&sum)[R][NV], Vec (&total)[R][NV]) {
#pragma GCC unroll 32
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) total[r][v] += sum[r][v], sum[r][v] = Vec{};
}

// The same for the first part or the only one.
template <int R, int NV>
__attribute__((always_inline)) inline void keep(const Vec (&sum)[R][NV], Vec (&total)[R][NV]) {
#pragma GCC unroll 32
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) total[r][v] = sum[r][v];
}

}  // namespace
