// Convolutions over channels-last float32 images, with bias, a summand and an activation fused in.
//
// Four kernels. `product` takes any convolution: a block of R output pixels times NV vectors of output channels
// stays in registers while the taps and input channels of the filter are added up; a tap that falls on padding
// is left out or reads zeros. `few_channels` does the same where the taps of a row lie end to end, also in an image
// that lies plane by plane. `slide` takes groups of few channels with three taps a row, `depthwise` one filter a
// channel; both use what they read of a row for every tap that it falls under. Weights come packed (convolution.py).
//
// At batch 1 a convolution of a small network takes tens of microseconds, as much as oneDNN spends on looking
// up its primitive. These kernels have nothing to look up. `sequence` runs many of them, one after another, so
// that a call from Python, an allocation and a walk through cold code are paid once (sequence.py).

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <immintrin.h>
#include <omp.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

using std::int64_t;

// Work that the threads of a parallel region share. Each begins with a part of its own, the same in every step, so
// that it reads what it wrote; one that is done early helps the others.
class Work {
 public:
  // `alone`: a multiple of so many items is done by one thread, one after another.
  Work(int64_t count, int threads, int64_t alone = 1)
      : count(count), chunk((count + threads * PARTS * alone - 1) / (threads * PARTS * alone) * alone), next(threads) {}

  // Calls `use` with ranges of items until all are taken.
  template <class Use>
  void share(const Use& use) {
    const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
    for (int64_t other = 0; other < all; other++) {
      const int64_t whose = (me + other) % all, low = count * whose / all, high = count * (whose + 1) / all;
      for (;;) {
        const int64_t from = low + next[whose].taken.fetch_add(chunk, std::memory_order_relaxed);
        if (from >= high) break;
        use(from, std::min(high, from + chunk));
      }
    }
  }

 private:
  static constexpr int64_t PARTS = 8;  // of what each thread begins with
  struct alignas(64) Taken {
    std::atomic<int64_t> taken{0};
  };
  int64_t count, chunk;
  std::vector<Taken> next;
};

template <int N>
using Constant = std::integral_constant<int, N>;

// PIXELS: how many stay in registers beside 1 to 4 vectors of output channels.
#if defined(__AVX512F__)
constexpr int VL = 16, PIXELS[] = {0, 14, 14, 8, 7};
#else
constexpr int VL = 8, PIXELS[] = {0, 12, 6, 4, 3};
#endif
// Long sums are made of shorter ones, as rounding grows with their length; more than this would cost time.
constexpr int64_t TOGETHER = 128;
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

// NaN in the second argument stays.
inline Vec above(float low, Vec value) { return low > value ? splat(low) : value; }
inline Vec below(float high, Vec value) { return high < value ? splat(high) : value; }

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
      default: return use([](Vec x) { return x; });
    }
  }
};

enum class Kind { DEPTHWISE, PRODUCT, SLIDING, FEW_CHANNELS };

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
  const int64_t memory = code / 100, pixels = code % 100 / 10, width = code % 10;
  const bool is_known = pixels == 0 ? 1 <= width && width <= 4 : pixels == 1 && (width == 1 || width == 4);
  TORCH_CHECK(code > 0 && memory <= 2 && is_known, "no kernel ", code);
  return {memory == 0 ? Kind::PRODUCT : Kind::FEW_CHANNELS, width, pixels == 1, memory == 2, code};
}

// Of one group: `c` input channels give `k`. Of the whole: `groups`; a pixel of the image has `image_pixel` floats.
struct Geometry {
  int64_t n, h, w, c, oh, ow, k, groups, kh, kw, sh, sw, ph, pw, dh, dw;
  int64_t image_pixel, out_pixel;
  bool checked;  // whether a tap may fall on padding
  bool in_line;  // whether pixel by pixel one is read for each result
};

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
        if (have >= VL) {
          store(to + v * VL, activated(add ? total[r][v] + load(add + v * VL) : total[r][v]));
        } else {
          float part[VL] = {};
          if (add) std::memcpy(part, add + v * VL, have * sizeof(float));
          store(part, activated(total[r][v] + load(part)));
          std::memcpy(to + v * VL, part, have * sizeof(float));
        }
      }
    }
  });
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
  for (int64_t each = 0; each < count; each++) {
    Vec filter[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) filter[v] = load(weight + v * VL);
    weight += WIDE * VL;
#pragma GCC unroll 32
    for (int r = LOW; r < HIGH; r++) {
      const Vec value = splat(value_of(r, each));
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
  if (is_long)
    carry(sum, total);
  else
    keep(sum, total);
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

// What a product over single pixels may do with an image while it reads it: images that stand for one another's
// further channels, times a scale, plus a shift, clamped.
struct Source {
  int64_t count;
  const float* const* images;
  const int64_t* widths;
  const float *scale, *shift;  // of each channel, or null
  int64_t scale_step;          // floats from the scale of one image of the batch to that of the next
  bool clamped;
  float low, high;

  // The pixels that `g` reads for results `first` to `last`, end to end.
  void gather(const Geometry& g, int64_t first, int64_t last, float* to) const {
    int64_t x = first % g.ow, y = first / g.ow % g.oh, n = first / g.ow / g.oh;
    for (int64_t pixel = first; pixel < last; pixel++) {
      const int64_t place = (n * g.h + y * g.sh) * g.w + x * g.sw;
      const float *times = scale ? scale + n * scale_step : nullptr, *plus = shift;
      if (++x == g.ow) {
        x = 0;
        if (++y == g.oh) y = 0, n++;
      }
      for (int64_t each = 0; each < count; each++) {
        const int64_t width = widths[each];
        const float* from = images[each] + place * width;
        int64_t c = 0;
        for (; c + VL <= width; c += VL) store(to + c, changed(load(from + c), times, plus, c));
        if (c < width) {
          float part[VL] = {}, factors[VL] = {}, terms[VL] = {};
          const int64_t rest = (width - c) * sizeof(float);
          std::memcpy(part, from + c, rest);
          if (times) std::memcpy(factors, times + c, rest);
          if (plus) std::memcpy(terms, plus + c, rest);
          store(part, changed(load(part), times ? factors : nullptr, plus ? terms : nullptr, 0));
          std::memcpy(to + c, part, rest);
        }
        to += width;
        if (times) times += width;
        if (plus) plus += width;
      }
    }
  }

  inline Vec changed(Vec value, const float* times, const float* plus, int64_t c) const {
    if (times && plus)
      value = fma(value, load(times + c), load(plus + c));
    else if (times)
      value = value * load(times + c);
    else if (plus)
      value = value + load(plus + c);
    return clamped ? below(high, above(low, value)) : value;
  }
};

// Items `low` to `high` of those that are a panel's blocks and then the next one's.
template <class Use>
inline void by_panels(int64_t low, int64_t high, int64_t blocks, const Use& use) {
  while (low < high) {
    const int64_t panel = low / blocks, end = std::min(high, (panel + 1) * blocks);
    use(panel, low - panel * blocks, end - panel * blocks);
    low = end;
  }
}

// The same product as `product`'s, over pixels that `source` gathers.
template <int R, int NV>
void gathered_product(const Geometry& g, const Activation& activation, const Source& source, const float* weight,
                      const float* other, float* out) {
  constexpr int64_t NR = NV * VL, NEAR = 16384;
  const int64_t panels = (g.k + NR - 1) / NR, panel = (g.c + 1) * NR;
  const int64_t pixels = g.n * g.oh * g.ow, blocks = (pixels + R - 1) / R;
  const int threads = at::get_num_threads();
  const bool weights_stay = g.c * g.k > pixels * g.c || blocks < 8 * threads;
  const int64_t together = std::max<int64_t>(1, NEAR / (R * g.c));
  Geometry line = g;
  line.n = line.h = line.oh = line.sh = line.sw = 1, line.w = line.ow = pixels;
  line.in_line = true;
  // All pixels for everyone, or those at hand for each thread.
  const int64_t share = weights_stay ? 0 : together * R * g.c;
  const at::Tensor space = at::empty({weights_stay ? pixels * g.c : share * threads}, at::kFloat);
  float* const memory = space.mutable_data_ptr<float>();
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
             const float* weight, const float* other, float* out, const Source* source) {
  if (source) return gathered_product<R, NV>(g, activation, *source, weight, other, out);
  constexpr int64_t NR = NV * VL, NEAR = 16384;  // floats of an image that stay near while all panels pass
  const int64_t in_group = (g.k + NR - 1) / NR, panels = in_group * g.groups;
  const int64_t reduced = g.kh * g.kw * g.c, panel = (reduced + 1) * NR;
  const int64_t pixels = g.n * g.oh * g.ow, blocks = (pixels + R - 1) / R;
  const int64_t together = std::max<int64_t>(1, NEAR / (R * g.image_pixel * g.sh * g.sw));
  const int threads = at::get_num_threads();
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
    default: TORCH_CHECK(false, "no kernel ", kernel.code);
  }
}

// P pixels of a row. KW and S are zero where the sizes are to be read from `g`; `checked`: taps may fall on padding
// to the left or right.
template <int P, int KW, int S, bool checked>
inline void pixels(const Geometry& g, const Activation& activation, const float* image, const float* weight,
                   float* out, int64_t top, int64_t side, int64_t from, int64_t to) {
  for (int64_t c = from; c < to; c += VL) {
    const int64_t at = std::min(c, g.c - VL);  // the last vector may overlap the one before
    Vec sum[P];
    const Vec bias = load(weight + g.kh * g.kw * g.c + at);
    for (int q = 0; q < P; q++) sum[q] = bias;
    for (int64_t i = 0; i < g.kh; i++) {
      const int64_t y = top + i * g.dh;
      if ((uint64_t)y >= (uint64_t)g.h) continue;
      const float* row = image + y * g.w * g.c + at;
      const float* filter = weight + i * g.kw * g.c + at;
      if constexpr (KW > 0) {
        Vec taps[KW];
        for (int j = 0; j < KW; j++) taps[j] = load(filter + j * g.c);
#pragma GCC unroll 32
        for (int x = 0; x < (P - 1) * S + KW; x++) {
          if (checked && (uint64_t)(side + x) >= (uint64_t)g.w) continue;
          const Vec value = load(row + (side + x) * g.c);
#pragma GCC unroll 8
          for (int q = 0; q < P; q++)
            if (x - q * S >= 0 && x - q * S < KW) sum[q] = fma(value, taps[x - q * S], sum[q]);
        }
      } else {
        for (int64_t j = 0; j < g.kw; j++) {
          const Vec tap = load(filter + j * g.c);
          for (int q = 0; q < P; q++) {
            const int64_t x = side + q * g.sw + j * g.dw;
            if (!checked || (uint64_t)x < (uint64_t)g.w) sum[q] = fma(load(row + x * g.c), tap, sum[q]);
          }
        }
      }
    }
    activation.apply([&](auto activated) {
      for (int q = 0; q < P; q++) store(out + q * g.c + at, activated(sum[q]));
    });
  }
}

// One row of results, over channels `from` to `to`. `picture` is one image of the batch.
template <int P, int KW, int S>
inline void depthwise_row(const Geometry& g, const Activation& activation, const float* picture, const float* weight,
                          float* line, int64_t top, int64_t from, int64_t to) {
  const int64_t reach = (g.kw - 1) * g.dw;
  auto few = [&](auto count, int64_t x) {
    constexpr int N = decltype(count)::value;
    const int64_t side = x * g.sw - g.pw;
    if (side < 0 || side + (N - 1) * g.sw + reach >= g.w)
      pixels<N, KW, S, true>(g, activation, picture, weight, line + x * g.c, top, side, from, to);
    else
      pixels<N, KW, S, false>(g, activation, picture, weight, line + x * g.c, top, side, from, to);
  };
  int64_t x = 0;
  for (; x + P <= g.ow; x += P) few(Constant<P>{}, x);
  for (; x + 2 <= g.ow; x += 2) few(Constant<2>{}, x);
  if (x < g.ow) few(Constant<1>{}, x);
}

using Row = void (*)(const Geometry&, const Activation&, const float*, const float*, float*, int64_t, int64_t, int64_t);

Row depthwise_row_for(const Geometry& g) {
  const int64_t key = g.dw == 1 && g.sw <= 2 ? g.kw * 10 + g.sw : 0;
  switch (key) {
    case 31: return depthwise_row<7, 3, 1>;
    case 32: return depthwise_row<7, 3, 2>;
    case 51: return depthwise_row<7, 5, 1>;
    case 52: return depthwise_row<7, 5, 2>;
    case 71: return depthwise_row<7, 7, 1>;
    default: return depthwise_row<7, 0, 0>;
  }
}

void depthwise(const Geometry& g, const Activation& activation, const float* image, const float* weight, float* out) {
  const int64_t rows = g.n * g.oh;
  const int threads = at::get_num_threads();
  // Few rows cannot be shared out evenly, but parts of rows can.
  const int64_t vectors = (g.c + VL - 1) / VL, parts = rows < 16 * threads && vectors >= 2 * threads ? threads : 1;
  const Row one = depthwise_row_for(g);
  Work work(rows * parts, threads);
#pragma omp parallel num_threads(threads)
  work.share([&](int64_t low, int64_t high) {
    for (int64_t each = low; each < high; each++) {
      const int64_t row = each / parts, part = each % parts, n = row / g.oh, top = row % g.oh * g.sh - g.ph;
      const int64_t from = vectors * part / parts * VL, to = std::min(g.c, vectors * (part + 1) / parts * VL);
      one(g, activation, image + n * g.h * g.w * g.c, weight, out + row * g.ow * g.c, top, from, to);
    }
  });
}

// For each channel of a group, the lanes of a vector of channels that have it, for every group in the vector.
inline Vec of_groups(Vec value, Ints lanes) {
#if defined(__AVX512F__)
  return (Vec)_mm512_permutexvar_ps((__m512i)lanes, (__m512)value);
#else
  return (Vec)_mm256_permutevar8x32_ps((__m256)value, (__m256i)lanes);
#endif
}

// P pixels of a row for one vector of output channels, three taps a row: what is read of the image serves all taps
// that it falls under. `narrow`: there are several groups in a vector, else a group is one vector or more.
template <int P, int S, bool narrow>
inline void slide(const Geometry& g, const Activation& activation, const float* picture, const float* zeros,
                  const float* weight, const float* other, float* out, int64_t top, int64_t side, int rows) {
  constexpr int ACROSS = (P - 1) * S + 3;
  Vec sum[P][1], total[P][1];
  begin(sum, weight);
  begin(total, nullptr);
  weight += VL;
  int64_t added = 0;
  for (int64_t i = 0; i < g.kh; i++, weight += 3 * g.c * VL) {
    const int64_t y = top + i * g.dh;
    if ((uint64_t)y >= (uint64_t)g.h) continue;
    const float* row = picture + y * g.w * g.image_pixel;
    const float* at[ACROSS];
    for (int x = 0; x < ACROSS; x++)
      at[x] = (uint64_t)(side + x) < (uint64_t)g.w ? row + (side + x) * g.image_pixel : zeros;
    if (added + 3 * g.c > TOGETHER) {
      added = 0;
      carry(sum, total);
    }
    added += 3 * g.c;
    Ints lanes;
    for (int v = 0; v < VL; v++) lanes[v] = narrow ? v / (int)g.c * (int)g.c : 0;
    for (int64_t c = 0; c < g.c; c++) {
      Vec taps[3];
      for (int j = 0; j < 3; j++) taps[j] = load(weight + (j * g.c + c) * VL);
#pragma GCC unroll 32
      for (int x = 0; x < ACROSS; x++) {
        const Vec value = narrow ? of_groups(load(at[x]), lanes) : splat(at[x][c]);
#pragma GCC unroll 32
        for (int q = 0; q < P; q++)
          if (x - q * S >= 0 && x - q * S < 3) sum[q][0] = fma(value, taps[x - q * S], sum[q][0]);
      }
      lanes += 1;
    }
  }
  carry(sum, total);
  finish<P, 1>(total, activation, other, out, g.out_pixel, rows, VL);
}

// `g` is of one group.
template <int S, bool narrow>
void sliding(const Geometry& g, const Activation& activation, const float* image, const float* zeros,
             const float* weight, const float* other, float* out) {
  constexpr int P = PIXELS[1];
  const int64_t panels = g.out_pixel / VL, panel = (g.kh * 3 * g.c + 1) * VL, rows = g.n * g.oh;
  const int threads = at::get_num_threads();
  auto one = [&](int64_t p, int64_t row) {
    const float* picture = image + row / g.oh * g.h * g.w * g.image_pixel + (narrow ? p * VL : p * VL / g.k * g.c);
    const int64_t top = row % g.oh * g.sh - g.ph, place = row * g.ow * g.out_pixel + p * VL;
    const float* filters = weight + p * panel;
    auto few = [&](auto count, int64_t x) {
      const int64_t start = place + x * g.out_pixel;
      slide<decltype(count)::value, S, narrow>(g, activation, picture, zeros, filters, other ? other + start : nullptr,
                                               out + start, top, x * S - g.pw, (int)std::min<int64_t>(P, g.ow - x));
    };
    int64_t x = 0;
    for (; g.ow - x > P / 2; x += P) few(Constant<P>{}, x);
    if (x < g.ow) few(Constant<P / 2>{}, x);
  };
  auto some = [&](int64_t p, int64_t from, int64_t to) {
    for (int64_t row = from; row < to; row++) one(p, row);
  };
  const bool weights_stay = rows < 8 * threads;
  Work work(weights_stay ? panels * rows : rows, threads);
#pragma omp parallel num_threads(threads)
  work.share([&](int64_t low, int64_t high) {
    if (weights_stay) {
      by_panels(low, high, rows, some);
    } else {
      for (int64_t p = 0; p < panels; p++) some(p, low, high);
    }
  });
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
    default: TORCH_CHECK(false, "no kernel over single pixels: ", kernel.code);
  }
}

// The images' means of each channel. Long sums are made of shorter ones here too.
void mean(const float* image, int64_t n, int64_t pixels, int64_t c, float* out) {
  constexpr int64_t WIDE = 4;
  const int64_t strips = (c + WIDE * VL - 1) / (WIDE * VL), work = n * strips;
  const int threads = at::get_num_threads();
#pragma omp parallel for schedule(static) num_threads(threads) if (n * pixels * c > 8192)
  for (int64_t each = 0; each < work; each++) {
    const float* picture = image + each / strips * pixels * c;
    float* to = out + each / strips * c;
    const int64_t from = each % strips * WIDE * VL, width = std::min(c - from, WIDE * VL);
    Vec total[WIDE] = {};
    for (int64_t start = 0; start < pixels; start += TOGETHER) {
      Vec sum[WIDE] = {};
      for (int64_t pixel = start; pixel < std::min(pixels, start + TOGETHER); pixel++) {
        const float* at = picture + pixel * c + from;
        for (int64_t v = 0; v < WIDE; v++) {
          if ((v + 1) * VL <= width) {
            sum[v] += load(at + v * VL);
          } else if (v * VL < width) {
            float part[VL] = {};
            std::memcpy(part, at + v * VL, (width - v * VL) * sizeof(float));
            sum[v] += load(part);
          }
        }
      }
      for (int64_t v = 0; v < WIDE; v++) total[v] += sum[v];
    }
    float means[WIDE * VL];
    for (int64_t v = 0; v < WIDE; v++) store(means + v * VL, total[v] / splat((float)pixels));
    std::memcpy(to + from, means, width * sizeof(float));
  }
}

// A copy of what a source gives, such as an image times a gate.
void gathered(const Source& source, const Geometry& g, float* out) {
  const int64_t pixels = g.n * g.oh * g.ow;
  const int threads = at::get_num_threads();
#pragma omp parallel num_threads(threads) if (pixels * g.c > 8192)
  {
    const int64_t me = omp_get_thread_num(), all = omp_get_num_threads(), from = pixels * me / all;
    source.gather(g, from, pixels * (me + 1) / all, out + from * g.c);
  }
}

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
  for (int64_t each = 0; each < count; each++) {
    const float* line = lines[each];
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
    for (int64_t each = 0; each < count; each++) {
      const int64_t y = top + each % g.kh * g.dh;
      const float*& line = scratch.lines[b * count + each];
      if ((uint64_t)y >= (uint64_t)g.h) {
        line = scratch.zeros.data();
        continue;
      }
      const float* from = image + (each / g.kh * g.h + y) * row;
      if (stop - start == across) {
        line = from + side * pixel;
        continue;
      }
      float* copy = scratch.copies.data() + (b * count + each) * span;
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
    default: TORCH_CHECK(false, "no kernel ", kernel.code);
  }
}

void few_channels(const Geometry& g, const Kernel& kernel, const Activation& activation, const float* image,
                  const float* weight, const float* other, float* out) {
  const RowOfFew one = row_of_few_for(kernel);
  const int64_t row = g.ow * g.out_pixel, picture = g.h * g.w * g.c;
  const int threads = at::get_num_threads();
  Work work(g.n * g.oh, threads);
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch;
    work.share([&](int64_t low, int64_t high) {
      for (int64_t each = low; each < high; each++)
        one(g, activation, image + each / g.oh * picture, kernel.planar, weight,
            other ? other + each * row : nullptr, out + each * row, each % g.oh * g.sh - g.ph, scratch);
    });
  }
}

// One convolution of a chain: the first, or one that reads what the stage before it gives.
struct Stage {
  Geometry g;
  Kernel kernel;
  Activation after;
  const float *weight, *other;

  int64_t row() const { return g.ow * g.k; }
  // The rows of its image that it reads for rows `low` to `high` of its result.
  std::pair<int64_t, int64_t> reads(int64_t low, int64_t high) const {
    const int64_t start = std::clamp<int64_t>(low * g.sh - g.ph, 0, g.h);
    return {start, std::clamp<int64_t>((high - 1) * g.sh - g.ph + (g.kh - 1) * g.dh + 1, start, g.h)};
  }
  // Those rows of the result for image `n` of the batch. `picture` is where the image's first row is or would be.
  void make(int64_t n, int64_t low, int64_t high, const float* picture, float* to, bool near, Scratch& scratch) const {
    const float* add = other ? other + (n * g.oh + low) * row() : nullptr;
    if (kernel.kind == Kind::DEPTHWISE) {
      const Row one = depthwise_row_for(g);
      for (int64_t y = low; y < high; y++)
        one(g, after, picture, weight, to + (y - low) * row(), y * g.sh - g.ph, 0, g.c);
    } else if (kernel.kind == Kind::FEW_CHANNELS) {
      const RowOfFew one = row_of_few_for(kernel);
      for (int64_t y = low; y < high; y++)
        one(g, after, picture, kernel.planar, weight, add ? add + (y - low) * row() : nullptr,
            to + (y - low) * row(), y * g.sh - g.ph, scratch);
    } else {
      product_of_pixels_for(kernel)(g, after, picture + low * g.w * g.c, weight, add, to, (high - low) * g.w, near);
    }
  }
};

// Convolutions of which each reads only the one before: rows of each are made as the next needs them, and none but
// the last leaves the nearer caches.
class Chain {
 public:
  Chain(const std::vector<Stage>& stages, const float* image) : stages(stages), image(image) {
    constexpr int64_t NEAR = 65536;  // floats of the rows in between
    while (band < stages.back().g.oh && floats_for(band + 1) <= NEAR) band++;
  }

  void run(float* out) const {
    const Geometry& g = stages.back().g;
    const int threads = at::get_num_threads();
    const int64_t share = floats_for(band), lines = g.n * g.oh;
    const at::Tensor space = at::empty({share * threads}, at::kFloat);
    float* const memory = space.mutable_data_ptr<float>();
    Work work(lines, threads, band);
#pragma omp parallel num_threads(threads)
    {
      const int64_t me = omp_get_thread_num();
      Thread mine{std::vector<Window>(stages.size()), {}};
      float* place = memory + share * me;
      for (size_t each = 0; each + 1 < stages.size(); each++) {
        mine.windows[each].memory = place;
        place += rows_for(band, each) * stages[each].row();
      }
      work.share([&](int64_t low, int64_t high) {
        for (int64_t at = low; at < high;) {
          const int64_t n = at / g.oh, y = at % g.oh, rows = std::min({band, g.oh - y, high - at});
          make(mine, stages.size() - 1, n, y, y + rows, out + at * stages.back().row());
          at += rows;
        }
      });
    }
  }

 private:
  struct Window {
    float* memory = nullptr;
    int64_t n = -1, start = 0, stop = 0;  // rows `start` to `stop` of image `n` are in it
  };
  struct Thread {
    std::vector<Window> windows;
    Scratch scratch;
  };

  const std::vector<Stage>& stages;
  const float* image;
  int64_t band = 1;  // rows of the last result that are made together

  // The most rows of a stage's result that `rows` of the last one's need.
  int64_t rows_for(int64_t rows, size_t which) const {
    for (size_t each = stages.size() - 1; each > which; each--) {
      const Geometry& g = stages[each].g;
      rows = std::min((rows - 1) * g.sh + (g.kh - 1) * g.dh + 1, g.h);
    }
    return rows;
  }
  int64_t floats_for(int64_t rows) const {
    int64_t sum = 0;
    for (size_t each = 0; each + 1 < stages.size(); each++) sum += rows_for(rows, each) * stages[each].row();
    return sum;
  }

  void make(Thread& mine, size_t which, int64_t n, int64_t low, int64_t high, float* to) const {
    const Stage& stage = stages[which];
    const Geometry& g = stage.g;
    const float* picture = image + n * g.h * g.w * g.c;
    if (which > 0) {
      const auto [start, stop] = stage.reads(low, high);
      picture = held(mine, which - 1, n, start, stop);
    }
    stage.make(n, low, high, picture, to, which + 1 < stages.size(), mine.scratch);
  }

  // Where the first row of a stage's result would be, with rows `low` to `high` there.
  const float* held(Thread& mine, size_t which, int64_t n, int64_t low, int64_t high) const {
    Window& window = mine.windows[which];
    const int64_t row = stages[which].row();
    const bool overlaps = window.n == n && window.start <= low && low < window.stop;
    const int64_t kept = overlaps ? std::min(window.stop, high) - low : 0;
    if (kept > 0) std::memmove(window.memory, window.memory + (low - window.start) * row, kept * row * sizeof(float));
    if (low + kept < high) make(mine, which, n, low + kept, high, window.memory + kept * row);
    window.n = n, window.start = low, window.stop = high;
    return window.memory - low * row;
  }
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

// Whether a kernel can do the convolution.
void check_kernel(const Geometry& g, const Kernel& kernel, const float* other) {
  TORCH_CHECK(kernel.kind != Kind::DEPTHWISE || (g.groups == g.c && g.k == g.c && g.c >= VL && !other),
              "a depthwise convolution");
  TORCH_CHECK(kernel.kind != Kind::FEW_CHANNELS || (g.groups == 1 && g.dw == 1 && !kernel.single_pixel),
              "taps end to end need one group without dilation, and several pixels at a time");
}

// `g` is of one group, but of all where each channel has a filter.
void check_packed(const at::Tensor& weight, const Geometry& g, const Kernel& kernel) {
  if (kernel.kind == Kind::DEPTHWISE) {
    TORCH_CHECK(weight.numel() == (g.kh * g.kw + 1) * g.c, "a weight packed for this convolution");
    return;
  }
  const int64_t wide = kernel.width * VL;
  TORCH_CHECK(weight.numel() == (g.k + wide - 1) / wide * wide * g.groups * (g.kh * g.kw * g.c + 1),
              "a weight packed for this convolution");
}

void check_stage(const Stage& stage, const at::Tensor& weight, bool first) {
  const Geometry& g = stage.g;
  check_kernel(g, stage.kernel, stage.other);
  const Kind kind = stage.kernel.kind;
  TORCH_CHECK(first || kind != Kind::FEW_CHANNELS, "only the first of a chain has few channels");
  TORCH_CHECK(kind == Kind::DEPTHWISE || kind == Kind::FEW_CHANNELS ||
                  (g.groups == 1 && g.in_line && stage.kernel.is_blocked_product()),
              "a product over single pixels");
  check_packed(weight, g, stage.kernel);
}

// One convolution. `image` is null where there is a `source`.
void run(Geometry g, const Kernel& kernel, const Activation& after, const float* image, const Source* source,
         const at::Tensor& weight, const float* add, float* to) {
  if (g.n * g.oh * g.ow * g.k == 0) return;
  const float* filters = weight.const_data_ptr<float>();
  TORCH_CHECK(!source || (g.groups == 1 && g.kh * g.kw == 1 && !g.checked && kernel.is_blocked_product()),
              "only a product over single pixels gathers them");
  check_kernel(g, kernel, add);
  if (kernel.kind == Kind::DEPTHWISE) {
    check_packed(weight, g, kernel);
    return depthwise(g, after, image, filters, to);
  }
  g.c /= g.groups, g.k /= g.groups;
  static thread_local std::vector<float> zeros;
  if ((int64_t)zeros.size() < g.c + VL) zeros.assign(g.c + VL, 0.f);
  if (kernel.kind == Kind::SLIDING) {
    const bool narrow = g.k < VL;
    TORCH_CHECK(g.kw == 3 && g.dw == 1 && (g.sw == 1 || g.sw == 2) && g.out_pixel % VL == 0 &&
                    (narrow ? g.c == g.k && VL % g.c == 0 : g.k % VL == 0),
                "groups of three taps a row that fill vectors");
    TORCH_CHECK(weight.numel() == g.out_pixel * (g.kh * 3 * g.c + 1), "a weight packed for this convolution");
    const auto run_sliding = g.sw == 1 ? (narrow ? sliding<1, true> : sliding<1, false>)
                                       : (narrow ? sliding<2, true> : sliding<2, false>);
    return run_sliding(g, after, image, zeros.data(), filters, add, to);
  }
  check_packed(weight, g, kernel);
  if (kernel.kind == Kind::FEW_CHANNELS) return few_channels(g, kernel, after, image, filters, add, to);
  product_for(kernel)(g, after, image, zeros.data(), filters, add, to, source);
}

at::MemoryFormat format_of(int64_t dimensions, bool planar = false) {
  return dimensions == 4 && !planar ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

at::Tensor convolution(const at::Tensor& given, const at::Tensor& weight, const std::optional<at::Tensor>& summand,
                       at::IntArrayRef sizes, int64_t code, int64_t activation, double low, double high) {
  TORCH_CHECK(sizes.size() == 10, "sizes: k, groups, kh, kw, sh, sw, ph, pw, dh, dw");
  const bool flat = given.dim() == 2;  // rows are pixels then
  TORCH_CHECK((flat || given.dim() == 4) && given.scalar_type() == at::kFloat && weight.scalar_type() == at::kFloat,
              "a 2-D or 4-D float32 image and a packed float32 weight");
  const Kernel kernel = kernel_of(code);
  const auto format = format_of(given.dim());
  const at::Tensor image = given.contiguous(format_of(given.dim(), kernel.planar));
  const Geometry g = flat ? geometry_of(sizes.data(), 1, image.size(0), 1, image.size(1))
                          : geometry_of(sizes.data(), image.size(0), image.size(2), image.size(3), image.size(1));
  at::Tensor out = flat ? at::empty({g.oh, g.k}, image.options())
                        : at::empty({g.n, g.k, g.oh, g.ow}, image.options(), format);
  at::Tensor other;
  if (summand) {
    TORCH_CHECK(summand->sizes() == out.sizes() && summand->scalar_type() == at::kFloat, "a summand like the result");
    other = summand->contiguous(format);
  }
  const Activation after{activation, (float)low, (float)high};
  const float* add = summand ? other.const_data_ptr<float>() : nullptr;
  run(g, kernel, after, image.const_data_ptr<float>(), nullptr, weight, add, out.mutable_data_ptr<float>());
  return out;
}

inline float number(int64_t bits) {
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return (float)value;
}

inline Activation activation_of(const int64_t* words) { return {words[0], number(words[1]), number(words[2])}; }

// Reads a program word by word.
struct Reader {
  const int64_t *at, *end;

  const int64_t* take(int64_t count) {
    TORCH_CHECK(count >= 0 && count <= end - at, "a program that ends where its length says");
    at += count;
    return at - count;
  }
  int64_t next() { return *take(1); }
};

// Steps over values that are numbered: the inputs, then the results, then those that live in one block of memory.
std::vector<at::Tensor> sequence(at::TensorList inputs, at::TensorList constants, const at::Tensor& program,
                                 at::IntArrayRef shapes) {
  TORCH_CHECK(program.scalar_type() == at::kLong && program.is_contiguous() && shapes.size() % 4 == 0,
              "a program and four sizes for each result");
  Reader read{program.const_data_ptr<int64_t>(), program.const_data_ptr<int64_t>() + program.numel()};
  const int64_t locals = read.next(), floats = read.next(), steps = read.next(), in_planes = read.next();
  const int64_t *offsets = read.take(locals), *planar = read.take(in_planes);
  auto is_planar = [=](int64_t value) { return std::find(planar, planar + in_planes, value) < planar + in_planes; };
  std::vector<at::Tensor> held, results;
  std::vector<float*> values;
  for (const at::Tensor& each : inputs) {
    TORCH_CHECK(each.scalar_type() == at::kFloat, "float32 inputs");
    held.push_back(each.contiguous(format_of(each.dim(), is_planar(values.size()))));
    values.push_back(const_cast<float*>(held.back().const_data_ptr<float>()));
  }
  for (size_t each = 0; each < shapes.size(); each += 4) {
    const auto n = shapes[each], c = shapes[each + 1], h = shapes[each + 2], w = shapes[each + 3];
    results.push_back(h < 0 ? at::empty({n, c}, at::kFloat)
                            : at::empty({n, c, h, w}, at::TensorOptions(at::kFloat), at::MemoryFormat::ChannelsLast));
    values.push_back(results.back().mutable_data_ptr<float>());
  }
  const at::Tensor arena = at::empty({floats}, at::kFloat);
  for (int64_t each = 0; each < locals; each++) values.push_back(arena.mutable_data_ptr<float>() + offsets[each]);
  auto constant = [&](int64_t which) { return which < 0 ? nullptr : constants.at(which).const_data_ptr<float>(); };
  auto value_or_null = [&](int64_t which) -> const float* {
    TORCH_CHECK(which < 0 || !is_planar(which), "a summand that lies pixel by pixel");
    return which < 0 ? nullptr : values.at(which);
  };
  std::vector<const float*> images;
  std::vector<int64_t> widths;
  std::vector<Stage> stages;
  for (int64_t step = 0; step < steps; step++) {
    const int64_t kind = read.next();
    float* const out = values.at(read.next());
    const int64_t count = read.next();
    images.clear(), widths.clear();
    bool by_planes = false;
    for (int64_t each = 0; each < count; each++) {
      const int64_t value = read.next();
      by_planes |= is_planar(value);
      TORCH_CHECK(!by_planes || value < (int64_t)inputs.size(), "only inputs lie plane by plane");
      images.push_back(values.at(value));
      widths.push_back(read.next());
    }
    const int64_t *image = read.take(4), n = image[0], h = image[1], w = image[2], c = image[3];
    TORCH_CHECK(!by_planes || kind == 0 || kind == 3, "an input in planes is read by a convolution");
    if (kind == 1) {
      mean(images.at(0), n, h * w, c, out);
      continue;
    }
    const int64_t gate = read.next();
    Source source{count, images.data(), widths.data(), constant(read.next()), constant(read.next()), 0};
    if (gate >= 0) source.scale = values.at(gate), source.scale_step = c;
    source.clamped = read.next(), source.low = number(read.next()), source.high = number(read.next());
    if (kind == 2) {
      const int64_t same[] = {c, 1, 1, 1, 1, 1, 0, 0, 1, 1};
      gathered(source, geometry_of(same, n, h, w, c), out);
      continue;
    }
    TORCH_CHECK(kind == 0 || kind == 3, "no step ", kind);
    const bool plain = count == 1 && !source.scale && !source.shift && !source.clamped;
    stages.clear();
    for (int64_t more = kind == 3 ? read.next() : 1; more > 0; more--) {
      const Geometry g = stages.empty() ? geometry_of(read.take(10), n, h, w, c)
                                        : geometry_of(read.take(10), n, stages.back().g.oh, stages.back().g.ow,
                                                      stages.back().g.k);
      const Kernel kernel = kernel_of(read.next());
      const int64_t weight = read.next(), summand = read.next();
      const Stage stage{g, kernel, activation_of(read.take(3)), constant(weight), value_or_null(summand)};
      TORCH_CHECK(!stages.empty() || by_planes == kernel.planar,
                  "a kernel and an image that lie alike in memory");
      if (kind == 0) {
        run(g, kernel, stage.after, images.at(0), plain ? nullptr : &source, constants.at(weight), stage.other, out);
        break;
      }
      check_stage(stage, constants.at(weight), stages.empty());
      stages.push_back(stage);
    }
    if (kind == 0) continue;
    TORCH_CHECK(plain && !stages.empty(), "a chain that reads one image as it is");
    Chain(stages, images.at(0)).run(out);
  }
  return results;
}

TORCH_LIBRARY_IMPL(fxpasses, CPU, library) {
  library.impl("convolution", convolution);
  library.impl("sequence", sequence);
}

}  // namespace

extern "C" int vector_length() { return VL; }
