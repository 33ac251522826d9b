// The operators `fxpasses::convolution`, `sequence` and `moments`: tensors in the place of pointers. Only torch's stable
// headers are read, which compile in a few seconds; library.py hands over the kernels, which it loaded.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "check.h"
#include "geometry.h"
#include "interface.h"
#include "kernel.h"

namespace {

using torch::stable::Tensor;

decltype(&fxpasses_convolution) run_convolution = nullptr;
decltype(&fxpasses_sequence) run_sequence = nullptr;
decltype(&fxpasses_moments) run_moments = nullptr;

void done(AOTITorchError error) { require(error == AOTI_TORCH_SUCCESS, "torch's own function failed"); }

template <class Call, class Run>
void run(const Run& kernels, const Call& call) {
  uint32_t threads = 1;
  done(torch_get_num_threads(&threads));
  char message[256];
  if (kernels(&call, (int)threads, message, sizeof message)) refuse(message);
}

bool is_float(const Tensor& tensor) {
  int32_t dtype = 0;
  done(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype == aoti_torch_dtype_float32();
}

// The strides of an image in channels-last memory or, `planar`, plane by plane; of a matrix row by row.
std::vector<int64_t> strides_of(const int64_t* sizes, int64_t dimensions, bool planar = false) {
  if (dimensions != 4) return {sizes[1], 1};
  const int64_t c = sizes[1], h = sizes[2], w = sizes[3];
  return planar ? std::vector<int64_t>{c * h * w, h * w, w, 1} : std::vector<int64_t>{h * w * c, 1, w * c, c};
}

Tensor empty(const int64_t* sizes, int64_t dimensions, bool planar = false) {
  AtenTensorHandle made = nullptr;
  done(aoti_torch_empty_strided(dimensions, sizes, strides_of(sizes, dimensions, planar).data(),
                                aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

// The tensor, or a copy where it lies otherwise in memory.
Tensor lying(const Tensor& tensor, bool planar = false) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const std::vector<int64_t> wanted = strides_of(sizes.data(), tensor.dim(), planar);
  bool lies = true;
  for (size_t at = 0; at < wanted.size(); at++) lies &= sizes[at] <= 1 || strides[at] == wanted[at];
  if (lies) return tensor;
  Tensor copy = empty(sizes.data(), tensor.dim(), planar);
  torch::stable::copy_(copy, tensor);
  return copy;
}

const float* read(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }

Tensor convolution(const Tensor& given, const Tensor& filters, const std::optional<Tensor>& summand,
                   const std::vector<int64_t>& sizes, int64_t kernel, int64_t activation, double low, double high) {
  const int64_t dimensions = given.dim();
  require(sizes.size() == 10, "sizes: k, groups, kh, kw, sh, sw, ph, pw, dh, dw");
  require((dimensions == 2 || dimensions == 4) && is_float(given) && is_float(filters),
          "a 2-D or 4-D float32 image and a packed float32 weight");
  const Tensor image = lying(given, kernel_of(kernel).planar);
  const auto shape = image.sizes();
  const bool flat = dimensions == 2;  // rows are pixels then
  const int64_t image_sizes[] = {flat ? 1 : shape[0], flat ? shape[0] : shape[2], flat ? 1 : shape[3], shape[1]};
  const Geometry g = geometry_of(sizes.data(), image_sizes[0], image_sizes[1], image_sizes[2], image_sizes[3]);
  const int64_t result[] = {flat ? g.oh : g.n, g.k, g.oh, g.ow};
  Tensor out = empty(result, dimensions);
  std::optional<Tensor> other;
  if (summand) {
    bool alike = is_float(*summand) && summand->dim() == dimensions;
    for (int64_t at = 0; alike && at < dimensions; at++) alike = summand->size(at) == result[at];
    require(alike, "a summand like the result");
    other = lying(*summand);
  }
  const FxpassesConvolution call{sizes.data(), image_sizes, kernel, activation, (float)low, (float)high, read(image),
                                 {read(filters), filters.numel()}, other ? read(*other) : nullptr,
                                 static_cast<float*>(out.mutable_data_ptr())};
  run(run_convolution, call);
  return out;
}

std::vector<Tensor> sequence(const std::vector<Tensor>& inputs, const std::vector<Tensor>& constants,
                             const Tensor& program, const std::vector<int64_t>& shapes) {
  int32_t dtype = 0;
  done(aoti_torch_get_dtype(program.get(), &dtype));
  require(dtype == aoti_torch_dtype_int64() && program.is_contiguous() && shapes.size() % 4 == 0,
          "a program and four sizes for each result");
  const int64_t* const words = static_cast<const int64_t*>(program.const_data_ptr());
  // A program begins with how many locals and planar inputs it lists, which follow the head (sequence.h).
  const int64_t count = program.numel(), planar = count < 3 ? 0 : 3 + words[0];
  const auto is_planar = [&](int64_t input) {
    for (int64_t at = planar; at < count && at < planar + words[2]; at++)
      if (words[at] == input) return true;
    return false;
  };
  std::vector<Tensor> held, results;
  std::vector<float*> values;
  std::vector<int64_t> sizes;
  std::vector<FxpassesConstant> given;
  const auto add = [&](const Tensor& tensor, float* memory) {
    const auto shape = tensor.sizes();
    const bool flat = tensor.dim() == 2;
    sizes.insert(sizes.end(), {shape[0], flat ? 1 : shape[2], flat ? 1 : shape[3], shape[1]});
    values.push_back(memory);
  };
  held.reserve(inputs.size());
  for (const Tensor& input : inputs) {
    require(is_float(input) && (input.dim() == 2 || input.dim() == 4), "float32 inputs");
    held.push_back(lying(input, is_planar((int64_t)held.size())));
    add(held.back(), const_cast<float*>(read(held.back())));
  }
  for (size_t at = 0; at < shapes.size(); at += 4) {
    results.push_back(empty(shapes.data() + at, shapes[at + 2] < 0 ? 2 : 4));
    add(results.back(), static_cast<float*>(results.back().mutable_data_ptr()));
  }
  given.reserve(constants.size());
  for (const Tensor& constant : constants) given.push_back({read(constant), constant.numel()});
  const FxpassesSequence call{words, count, values.data(), sizes.data(), (int64_t)inputs.size(),
                              (int64_t)results.size(), given.data(), (int64_t)given.size()};
  run(run_sequence, call);
  return results;
}

Tensor moments(const Tensor& given, int64_t groups) {
  require(given.dim() == 4 && is_float(given), "a 4-D float32 image");
  const Tensor image = lying(given);
  const auto shape = image.sizes();
  const int64_t sizes[] = {shape[0], shape[2], shape[3], shape[1]};
  const int64_t result[] = {2, shape[0], groups, 1, 1}, strides[] = {shape[0] * groups, groups, 1, 1, 1};
  const int32_t dtype = aoti_torch_dtype_float32(), device = aoti_torch_device_type_cpu();
  AtenTensorHandle made = nullptr;
  done(aoti_torch_empty_strided(5, result, strides, dtype, device, 0, &made));
  Tensor out(made);
  const FxpassesMoments call{sizes, groups, read(image), static_cast<float*>(out.mutable_data_ptr())};
  run(run_moments, call);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(fxpasses, CPU, library) {
  library.impl("convolution", TORCH_BOX(&convolution));
  library.impl("sequence", TORCH_BOX(&sequence));
  library.impl("moments", TORCH_BOX(&moments));
}

}  // namespace

extern "C" void fxpasses_use(void* convolution_of_kernels, void* sequence_of_kernels, void* moments_of_kernels) {
  run_convolution = reinterpret_cast<decltype(run_convolution)>(convolution_of_kernels);
  run_sequence = reinterpret_cast<decltype(run_sequence)>(sequence_of_kernels);
  run_moments = reinterpret_cast<decltype(run_moments)>(moments_of_kernels);
}
