// The operator `sequence`: steps over numbered values in one call. sequence.py writes the program that it reads.
//
//     values   inputs | results | others, in one block of memory
//     step     kind, result, what it reads [, gate, scale, shift, clamp [, convolutions]]

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "chain.h"
#include "dispatch.h"
#include "gather.h"
#include "mean.h"

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
    TORCH_CHECK(count >= 0 && count <= end - at, "a program that ends where its length says");
    at += count;
    return at - count;
  }
  int64_t next() { return *take(1); }
};

// The values of one call by their numbers.
class Values {
 public:
  std::vector<at::Tensor> results;

  // `planar`: the inputs that are read plane by plane; `offsets`: where the others lie among `floats`.
  Values(at::TensorList inputs, at::IntArrayRef shapes, int64_t floats, at::IntArrayRef offsets, at::IntArrayRef planar)
      : inputs(inputs.size()), planar(planar) {
    for (const at::Tensor& input : inputs) {
      TORCH_CHECK(input.scalar_type() == at::kFloat, "float32 inputs");
      held.push_back(input.contiguous(format_of(input.dim(), is_planar(memory.size()))));
      memory.push_back(const_cast<float*>(held.back().const_data_ptr<float>()));
    }
    for (size_t at = 0; at < shapes.size(); at += 4) {
      const auto n = shapes[at], c = shapes[at + 1], h = shapes[at + 2], w = shapes[at + 3];
      results.push_back(h < 0 ? at::empty({n, c}, at::kFloat)
                              : at::empty({n, c, h, w}, at::TensorOptions(at::kFloat), at::MemoryFormat::ChannelsLast));
      memory.push_back(results.back().mutable_data_ptr<float>());
    }
    held.push_back(at::empty({floats}, at::kFloat));
    for (const int64_t offset : offsets) memory.push_back(held.back().mutable_data_ptr<float>() + offset);
  }

  float* at(int64_t value) const { return memory.at(value); }
  bool is_input(int64_t value) const { return value < inputs; }
  bool is_planar(int64_t value) const { return std::find(planar.begin(), planar.end(), value) != planar.end(); }

 private:
  int64_t inputs;
  at::IntArrayRef planar;
  std::vector<at::Tensor> held;
  std::vector<float*> memory;
};

enum StepKind : int64_t { PRODUCT, MEAN, GATHER, CHAIN };

// Reads and does one step after another.
class Steps {
 public:
  Steps(Reader& read, const Values& values, at::TensorList constants)
      : read(read), values(values), constants(constants) {}

  void next() {
    const int64_t kind = read.next();
    float* const out = values.at(read.next());
    read_images();
    const int64_t* const image = read.take(4);  // n, h, w, c
    TORCH_CHECK(!by_planes || kind == PRODUCT || kind == CHAIN, "an input in planes is read by a convolution");
    if (kind == MEAN) return mean(images.at(0), image[0], image[1] * image[2], image[3], out);
    const Source source = read_source(image[3]);
    if (kind == GATHER) {
      const int64_t same[] = {image[3], 1, 1, 1, 1, 1, 0, 0, 1, 1};
      return gathered(source, geometry_of(same, image[0], image[1], image[2], image[3]), out);
    }
    TORCH_CHECK(kind == PRODUCT || kind == CHAIN, "no step ", kind);
    const bool plain = images.size() == 1 && !source.scale && !source.shift && !source.clamped;
    stages.clear();
    if (kind == PRODUCT) {
      const auto [stage, weight] = read_convolution(image);
      return run(stage.g, stage.kernel, stage.after, images.at(0), plain ? nullptr : &source, weight, stage.other, out);
    }
    for (int64_t more = read.next(); more > 0; more--) {
      const auto [stage, weight] = read_convolution(image);
      check_stage(stage, weight, stages.empty());
      stages.push_back(stage);
    }
    TORCH_CHECK(plain && !stages.empty(), "a chain that reads one image as it is");
    Chain(stages, images.at(0)).run(out);
  }

 private:
  struct Convolution {
    Stage stage;
    const at::Tensor& weight;
  };

  Reader& read;
  const Values& values;
  at::TensorList constants;
  // Of the step at hand; here so that their memory is used again.
  std::vector<const float*> images;
  std::vector<int64_t> widths;
  bool by_planes = false;
  std::vector<Stage> stages;

  void read_images() {
    images.clear(), widths.clear();
    by_planes = false;
    for (int64_t more = read.next(); more > 0; more--) {
      const int64_t value = read.next();
      by_planes |= values.is_planar(value);
      TORCH_CHECK(!by_planes || values.is_input(value), "only inputs lie plane by plane");
      images.push_back(values.at(value));
      widths.push_back(read.next());
    }
  }

  const float* constant_or_null(int64_t which) const {
    return which < 0 ? nullptr : constants.at(which).const_data_ptr<float>();
  }

  Source read_source(int64_t channels) {
    const int64_t gate = read.next(), scale = read.next(), shift = read.next();
    Source source{(int64_t)images.size(), images.data(), widths.data(), constant_or_null(scale),
                  constant_or_null(shift), 0};
    if (gate >= 0) source.scale = values.at(gate), source.scale_step = channels;
    source.clamped = read.next(), source.low = number(read.next()), source.high = number(read.next());
    return source;
  }

  // A convolution of the image that was read or, in a chain, of what the stage before it gives.
  Convolution read_convolution(const int64_t* image) {
    const int64_t* const sizes = read.take(10);
    const Geometry g =
        stages.empty() ? geometry_of(sizes, image[0], image[1], image[2], image[3])
                       : geometry_of(sizes, image[0], stages.back().g.oh, stages.back().g.ow, stages.back().g.k);
    const Kernel kernel = kernel_of(read.next());
    const at::Tensor& weight = constants.at(read.next());
    const int64_t summand = read.next();
    const Activation after = activation_of(read.take(3));
    TORCH_CHECK(summand < 0 || !values.is_planar(summand), "a summand that lies pixel by pixel");
    TORCH_CHECK(!stages.empty() || by_planes == kernel.planar, "a kernel and an image that lie alike in memory");
    const float* const filters = weight.const_data_ptr<float>();
    return {{g, kernel, after, filters, summand < 0 ? nullptr : values.at(summand)}, weight};
  }
};

std::vector<at::Tensor> sequence(at::TensorList inputs, at::TensorList constants, const at::Tensor& program,
                                 at::IntArrayRef shapes) {
  TORCH_CHECK(program.scalar_type() == at::kLong && program.is_contiguous() && shapes.size() % 4 == 0,
              "a program and four sizes for each result");
  Reader read{program.const_data_ptr<int64_t>(), program.const_data_ptr<int64_t>() + program.numel()};
  const int64_t locals = read.next(), floats = read.next(), steps = read.next(), in_planes = read.next();
  const int64_t *offsets = read.take(locals), *planar = read.take(in_planes);
  Values values(inputs, shapes, floats, {offsets, (size_t)locals}, {planar, (size_t)in_planes});
  Steps work(read, values, constants);
  for (int64_t step = 0; step < steps; step++) work.next();
  return values.results;
}

}  // namespace
