// The operator `sequence`: steps over numbered values in one call. sequence.py writes the program that it reads.
//
//     values   inputs | results | others, in one block of memory
//     step     kind, result, what it reads, channels [, gate, scale, shift, clamp [, convolutions]] [, window]
//     reads    values, of each the first channel and how many
//
// A program says nothing of batches, heights and widths: they follow from those of the inputs, and with them where
// the other values lie in the block. So one program serves all sizes.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "chain.h"
#include "check.h"
#include "dispatch.h"
#include "gather.h"
#include "maximum.h"
#include "mean.h"
#include "memory.h"
#include "sum.h"

namespace {

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
    require(count >= 0 && count <= end - at, "a program that ends where its length says");
    at += count;
    return at - count;
  }
  int64_t next() { return *take(1); }
};

// One of `count` things that a word of a program counts.
template <class Thing>
inline const Thing& counted(const Thing* things, int64_t count, int64_t which, const char* wanted) {
  require(0 <= which && which < count, wanted);
  return things[which];
}

// What a program begins with.
struct Head {
  int64_t locals, steps, in_planes;
  const int64_t *last, *planar;  // of each local the last step that reads it; the inputs that lie plane by plane

  explicit Head(Reader& read)
      : locals(read.next()), steps(read.next()), in_planes(read.next()), last(read.take(locals)),
        planar(read.take(in_planes)) {}

  bool is_planar(int64_t value) const { return std::find(planar, planar + in_planes, value) != planar + in_planes; }
};

// The words of one convolution.
struct ConvolutionWords {
  static constexpr int64_t COUNT = 16;
  const int64_t* words;

  const int64_t* sizes() const { return words; }
  int64_t kernel() const { return words[10]; }
  int64_t filters() const { return words[11]; }
  int64_t summand() const { return words[12]; }
  const int64_t* activation() const { return words + 13; }
};

enum StepKind : int64_t { PRODUCT, MEAN, GATHER, CHAIN, SUM, MAX };

// The words of one step.
struct StepWords {
  int64_t kind, result, images;
  const int64_t* parts;  // of each image its value, the first channel that is read, and how many are
  int64_t channels;
  const int64_t* source = nullptr;  // gate, scale, shift, whether it is clamped, low, high
  int64_t convolutions = 0;
  const int64_t* first = nullptr;
  const int64_t* window = nullptr;  // of a maximum: kh, kw, sh, sw, ph, pw, dh, dw

  explicit StepWords(Reader& read)
      : kind(read.next()), result(read.next()), images(read.next()), parts(read.take(3 * images)), channels(read.next()) {
    if (kind < PRODUCT || kind > MAX) refuse("no step " + std::to_string(kind));
    require(images > 0, "a step that reads something");
    if (kind == MAX) window = read.take(8);
    if (kind == MEAN || kind == SUM || kind == MAX) return;
    source = read.take(6);
    if (kind != GATHER) convolutions = kind == PRODUCT ? 1 : read.next();
    first = read.take(ConvolutionWords::COUNT * convolutions);
  }

  int64_t value(int64_t which) const { return parts[3 * which]; }
  int64_t start(int64_t which) const { return parts[3 * which + 1]; }
  int64_t width(int64_t which) const { return parts[3 * which + 2]; }
  ConvolutionWords convolution(int64_t which) const { return {first + ConvolutionWords::COUNT * which}; }
};

// The sizes of a value. A matrix is a batch of single pixels.
struct Shape {
  int64_t n, h, w, c;

  int64_t floats() const { return n * h * w * c; }
  bool operator==(const Shape& other) const {
    return n == other.n && h == other.h && w == other.w && c == other.c;
  }
};

// The values of one call by their numbers: those given, of which the first are inputs, then those in one block.
class Values {
 public:
  // `read` is where the steps begin.
  Values(const FxpassesSequence& call, const Head& head, Reader read) : inputs(call.inputs) {
    const int64_t given = call.inputs + call.results;
    shapes.resize(given + head.locals), memory.assign(call.values, call.values + given);
    std::vector<int64_t> places(head.locals);
    std::vector<Taken> taken;  // in the order in which they lie in the block
    for (int64_t value = 0; value < given; value++) {
      const int64_t* const sizes = call.shapes + 4 * value;
      shapes[value] = {sizes[0], sizes[1], sizes[2], sizes[3]};
    }
    for (int64_t at = 0; at < head.steps; at++) {
      const StepWords step(read);
      const Shape result = result_of(step);
      if (step.result < given) {
        require(shape(step.result) == result, "a result of the size that its step gives");
        continue;
      }
      const int64_t local = step.result - given;
      require(local < head.locals, NUMBERED);
      shapes[step.result] = result;
      places[local] = place(taken, result.floats(), at, head.last[local]);
    }
    block.emplace(size);
    for (const int64_t place : places) memory.push_back(block->get() + place);
  }

  float* at(int64_t value) const { return counted(memory.data(), (int64_t)memory.size(), value, NUMBERED); }
  const Shape& shape(int64_t value) const { return counted(shapes.data(), (int64_t)shapes.size(), value, NUMBERED); }
  bool is_input(int64_t value) const { return value < inputs; }
  int64_t floats() const { return size; }

  // The image that a step reads: its values one after another along the channels, but for a sum one upon another.
  Shape image_of(const StepWords& step) const {
    Shape image = shape(step.value(0));
    int64_t channels = 0;
    for (int64_t which = 0; which < step.images; which++) {
      const Shape& one = shape(step.value(which));
      require(one.n == image.n && one.h == image.h && one.w == image.w, "images of equal sizes");
      require(step.start(which) >= 0 && step.width(which) > 0 && step.start(which) + step.width(which) <= one.c,
              "images of the channels that the step reads");
      require(step.kind != SUM || step.width(which) == step.width(0), "summands of as many channels");
      channels = step.kind == SUM ? step.width(0) : channels + step.width(which);
    }
    require(channels == step.channels, "as many channels as the step says");
    image.c = channels;
    return image;
  }

 private:
  static constexpr const char* NUMBERED = "values that are numbered in range";
  struct Taken {
    int64_t start, stop, last;
  };

  int64_t inputs, size = 0;
  std::vector<Shape> shapes;
  std::vector<float*> memory;
  std::optional<Floats> block;

  Shape result_of(const StepWords& step) const {
    Shape shape = image_of(step);
    if (step.kind == MEAN) return {shape.n, 1, 1, shape.c};
    if (step.kind == MAX) {
      const Geometry g = window_of(step.window, shape.n, shape.h, shape.w, shape.c);
      return {g.n, g.oh, g.ow, g.k};
    }
    for (int64_t which = 0; which < step.convolutions; which++) {
      const Geometry g = geometry_of(step.convolution(which).sizes(), shape.n, shape.h, shape.w, shape.c);
      shape = {g.n, g.oh, g.ow, g.k};
    }
    return shape;
  }

  // The first gap that fits, from the step that gives a value to the last that reads it.
  int64_t place(std::vector<Taken>& taken, int64_t floats, int64_t step, int64_t last) {
    constexpr int64_t LINE = 16;  // floats of a line of the caches
    taken.erase(std::remove_if(taken.begin(), taken.end(), [step](const Taken& one) { return one.last < step; }),
                taken.end());
    floats = (floats + LINE - 1) / LINE * LINE;
    int64_t start = 0;
    auto next = taken.begin();
    for (; next != taken.end() && start + floats > next->start; ++next) start = std::max(start, next->stop);
    taken.insert(next, {start, start + floats, last});
    size = std::max(size, start + floats);
    return start;
  }
};

// Does one step after another.
class Steps {
 public:
  Steps(const Head& head, const Values& values, const Packed* constants, int64_t count, int threads)
      : head(head), values(values), constants(constants), count(count), threads(threads) {}

  void run(const StepWords& step) {
    float* const out = values.at(step.result);
    const Shape image = values.image_of(step);
    read_images(step);
    require(!by_planes || step.convolutions > 0, "an input in planes is read by a convolution");
    require(is_whole || step.kind == SUM || step.kind == GATHER ||
                (step.kind == PRODUCT && kernel_of(step.convolution(0).kernel()).reads_parts()),
            "a step that can read some channels of a value");
    if (step.kind == MEAN) return mean(images[0], image.n, image.h * image.w, image.c, out, threads);
    if (step.kind == MAX)
      return maximum(window_of(step.window, image.n, image.h, image.w, image.c), images[0], out, threads);
    if (step.kind == SUM)
      return sum(images.data(), steps.data(), (int64_t)images.size(), image.n * image.h * image.w, image.c, out, threads);
    const Source source = read_source(step);
    if (step.kind == GATHER) {
      const int64_t same[] = {image.c, 1, 1, 1, 1, 1, 0, 0, 1, 1};
      return gathered(source, geometry_of(same, image.n, image.h, image.w, image.c), out, threads);
    }
    const bool plain = images.size() == 1 && !source.scale && !source.shift && !source.clamped;
    stages.clear();
    for (int64_t which = 0; which < step.convolutions; which++) stages.push_back(read_convolution(step, which, image));
    if (step.kind == PRODUCT) {
      Stage& one = stages[0];
      if (plain) one.g.image_pixel = steps[0];
      return ::run(one.g, one.kernel, one.after, images[0], plain ? nullptr : &source, one.weight, one.other, out,
                   threads);
    }
    require(plain && !stages.empty(), "a chain that reads one image as it is");
    for (const Stage& stage : stages) check_stage(stage, &stage == &stages[0]);
    Chain(stages, images[0], threads).run(out);
  }

 private:
  const Head& head;
  const Values& values;
  const Packed* constants;
  int64_t count;
  int threads;
  // Of the step at hand; here so that their memory is used again.
  std::vector<const float*> images;
  std::vector<int64_t> widths, steps;
  bool by_planes = false, is_whole = true;  // whether every value is read with all its channels
  std::vector<Stage> stages;

  void read_images(const StepWords& step) {
    images.clear(), widths.clear(), steps.clear();
    by_planes = false, is_whole = true;
    for (int64_t which = 0; which < step.images; which++) {
      const int64_t value = step.value(which);
      is_whole &= step.width(which) == values.shape(value).c;
      by_planes |= head.is_planar(value);
      require(!by_planes || values.is_input(value), "only inputs lie plane by plane");
      images.push_back(values.at(value) + step.start(which));
      widths.push_back(step.width(which)), steps.push_back(values.shape(value).c);
    }
    require(!by_planes || is_whole, "all channels of what lies plane by plane");
  }

  const Packed& constant(int64_t which) const {
    return counted(constants, count, which, "constants that are numbered in range");
  }
  const float* vector_or_null(int64_t which, int64_t channels) const {
    if (which < 0) return nullptr;
    require(constant(which).count == channels, "a number for each channel");
    return constant(which).floats;
  }

  Source read_source(const StepWords& step) {
    const int64_t* const words = step.source;
    Source source{(int64_t)images.size(), images.data(), widths.data(), steps.data(), vector_or_null(words[1], step.channels),
                  vector_or_null(words[2], step.channels), 0};
    if (words[0] >= 0) {
      const Shape image = values.image_of(step), gate{image.n, 1, 1, image.c};
      require(values.shape(words[0]) == gate, "a gate of each image's channels");
      source.scale = values.at(words[0]), source.scale_step = image.c;
    }
    source.clamped = words[3], source.low = number(words[4]), source.high = number(words[5]);
    return source;
  }

  // A convolution of the image that was read or, in a chain, of what the stage before it gives.
  Stage read_convolution(const StepWords& step, int64_t which, const Shape& image) const {
    const ConvolutionWords words = step.convolution(which);
    const Geometry g = which == 0 ? geometry_of(words.sizes(), image.n, image.h, image.w, image.c)
                            : geometry_of(words.sizes(), image.n, stages.back().g.oh, stages.back().g.ow,
                                          stages.back().g.k);
    const Kernel kernel = kernel_of(words.kernel());
    const int64_t summand = words.summand();
    require(summand < 0 || !head.is_planar(summand), "a summand that lies pixel by pixel");
    require(which > 0 || by_planes == kernel.planar, "a kernel and an image that lie alike in memory");
    const Shape result{g.n, g.oh, g.ow, g.k};
    require(summand < 0 || values.shape(summand) == result, "a summand of the result's size");
    return {g, kernel, activation_of(words.activation()), constant(words.filters()),
            summand < 0 ? nullptr : values.at(summand)};
  }
};

}  // namespace
