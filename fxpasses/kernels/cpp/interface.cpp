// The kernels as plain C functions over pointers and sizes. No header of torch is seen here, so that this compiles in
// seconds, once for each length of vectors, and serves every version of torch; operator.cpp makes operators of it.
//
// `product` takes any convolution, `few_channels` does the same where the taps of a row lie end to end, also in an
// image that lies plane by plane; `slide` takes groups of few channels with three taps a row, `depthwise` one filter a
// channel, `winograd` three taps each way in fewer multiplications (dispatch.h). Images are float32, in channels-last memory; weights come packed (convolution.py).
//
// At batch 1 a convolution of a small network takes tens of microseconds, as much as oneDNN spends on looking
// up its primitive. These kernels have nothing to look up. A sequence is many of them, one after another, so
// that a call from Python, an allocation and a walk through cold code are paid once (sequence.py).

#include "interface.h"

#include <cstdio>
#include <exception>

#include "dispatch.h"
#include "moments.h"
#include "sequence.h"
#include "step_times.h"

namespace {

template <class Do>
int told(char* message, int64_t room, const Do& work) {
  try {
    work();
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(message, room, "%s", error.what());
    return 1;
  }
}

}  // namespace

extern "C" {

int fxpasses_vector_length() { return VL; }

int fxpasses_convolution(const FxpassesConvolution* call, int threads, char* message, int64_t room) {
  return told(message, room, [&] {
    const int64_t* const image = call->image_sizes;
    const Geometry g = geometry_of(call->sizes, image[0], image[1], image[2], image[3]);
    run(g, kernel_of(call->kernel), {call->activation, call->low, call->high}, call->image, nullptr,
        {call->filters.floats, call->filters.count}, call->summand, call->out, threads);
  });
}

int fxpasses_moments(const FxpassesMoments* call, int threads, char* message, int64_t room) {
  return told(message, room, [&] {
    const int64_t* const image = call->image_sizes;
    const int64_t pixels = image[1] * image[2];
    require(call->groups > 0 && image[3] % call->groups == 0, "groups that divide the channels");
    require(image[0] * pixels * image[3] > 0, "an image of some pixels");
    moments(call->image, image[0], pixels, image[3], call->groups, call->out, threads);
  });
}

int fxpasses_sequence(const FxpassesSequence* call, int threads, char* message, int64_t room) {
  return told(message, room, [&] {
    Reader read{call->program, call->program + call->words};
    const Head head(read);
    const Values values(*call, head, read);
    Steps steps(head, values, call->constants, call->constant_count, threads);
    for (int64_t at = 0; at < head.steps; at++) {
      const int64_t* const words = read.at;
      const StepWords step(read);
      const StepClock clock(words, values, step);
      steps.run(step);
    }
  });
}

int fxpasses_sequence_memory(const FxpassesSequence* call, int64_t* floats, char* message, int64_t room) {
  return told(message, room, [&] {
    Reader read{call->program, call->program + call->words};
    const Head head(read);
    *floats = Values(*call, head, read).floats();
  });
}

}  // extern "C"
