// Vectors of floats, as long as the CPU's registers: VL of them, 8 with AVX2 and 16 with AVX-512.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <type_traits>

namespace {

// A number that is a type.
template <int N>
using Constant = std::integral_constant<int, N>;

#if defined(__AVX512F__)
constexpr int VL = 16;
#else
constexpr int VL = 8;
#endif
typedef float Vec __attribute__((vector_size(VL * 4)));
typedef float Unaligned __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef int Ints __attribute__((vector_size(VL * 4)));

inline Vec load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
inline void store(float* to, Vec value) { *reinterpret_cast<Unaligned*>(to) = value; }
// Intrinsics, since `Vec{} + value` is an addition for the compiler, which cannot know that it is no minus zero.
#if defined(__AVX512F__)
inline Vec splat(float value) { return (Vec)_mm512_set1_ps(value); }
inline Vec fma(Vec a, Vec b, Vec c) { return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#else
inline Vec splat(float value) { return (Vec)_mm256_set1_ps(value); }
inline Vec fma(Vec a, Vec b, Vec c) { return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#endif

#if defined(__AVX512F__)
// The first floats of a vector, of which nothing beside is read or written.
typedef __mmask16 Some;
inline Some first(int64_t count) { return count >= VL ? (Some)0xffff : (Some)((1u << count) - 1); }
inline Vec load(const float* from, Some some) { return (Vec)_mm512_maskz_loadu_ps(some, from); }
inline void store(float* to, Vec value, Some some) { _mm512_mask_storeu_ps(to, some, (__m512)value); }
#endif

// NaN in the second argument stays.
inline Vec above(float low, Vec value) { return low > value ? splat(low) : value; }
inline Vec below(float high, Vec value) { return high < value ? splat(high) : value; }

}  // namespace
