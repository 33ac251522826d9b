// Convolutions over channels-last float32 images, with bias, a summand and an activation fused in: two operators.
//
// `convolution` is one of them (dispatch.h): `product` takes any, `few_channels` does the same where the taps of a row
// lie end to end, also in an image that lies plane by plane; `slide` takes groups of few channels with three taps a
// row, `depthwise` one filter a channel. Weights come packed (convolution.py).
//
// At batch 1 a convolution of a small network takes tens of microseconds, as much as oneDNN spends on looking
// up its primitive. These kernels have nothing to look up. `sequence` runs many of them, one after another, so
// that a call from Python, an allocation and a walk through cold code are paid once (sequence.py).
//
// library.py puts the headers in their places and compiles one text.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstdint>
#include <optional>

#include "dispatch.h"
#include "sequence.h"

namespace {

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

TORCH_LIBRARY_IMPL(fxpasses, CPU, library) {
  library.impl("convolution", convolution);
  library.impl("sequence", sequence);
}

}  // namespace

extern "C" int vector_length() { return VL; }
