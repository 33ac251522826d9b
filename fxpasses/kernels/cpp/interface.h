// The plain C interface between the kernels and whoever calls them.

#pragma once

#include <stdint.h>

extern "C" {

// A weight as a kernel reads it, or a vector of channels.
struct FxpassesConstant {
  const float* floats;
  int64_t count;
};

struct FxpassesConvolution {
  const int64_t* sizes;        // k, groups, kh, kw, sh, sw, ph, pw, dh, dw
  const int64_t* image_sizes;  // n, h, w, c
  int64_t kernel;              // kernel.py has the table
  int64_t activation;          // activations.h too
  float low, high;             // of a clamp
  const float* image;
  FxpassesConstant filters;
  const float* summand;  // like the result, or null
  float* out;
};

struct FxpassesSequence {
  const int64_t* program;  // sequence.py writes it
  int64_t words;
  float* const* values;   // the inputs, which are only read, then the results
  const int64_t* shapes;  // of each of them n, h, w, c; a matrix is a batch of single pixels
  int64_t inputs, results;
  const FxpassesConstant* constants;
  int64_t constant_count;
};

struct FxpassesMoments {
  const int64_t* image_sizes;  // n, h, w, c
  int64_t groups;              // of channels
  const float* image;
  float* out;  // a variance for each image's groups, then their means
};

// Floats of a vector.
int fxpasses_vector_length();

// Zero, or one with what is wrong in `message`, which has `room` for so many characters.
int fxpasses_convolution(const FxpassesConvolution* call, int threads, char* message, int64_t room);
int fxpasses_sequence(const FxpassesSequence* call, int threads, char* message, int64_t room);
int fxpasses_moments(const FxpassesMoments* call, int threads, char* message, int64_t room);
// How many floats a call needs for what is neither input nor result.
int fxpasses_sequence_memory(const FxpassesSequence* call, int64_t* floats, char* message, int64_t room);
}
