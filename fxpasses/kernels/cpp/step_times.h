// What each step of a sequence takes: noted by a library that is compiled with FXPASSES_STEP_TIMES, and by no other.

#pragma once

#include <cstddef>
#include <cstdint>

#ifdef FXPASSES_STEP_TIMES

#include <algorithm>
#include <chrono>

constexpr int64_t STAGES = 16;

// step_times.py reads this.
struct FxpassesStep {
  const int64_t* words;    // of the program, where the step begins
  int64_t image_sizes[4];  // n, h, w, c of what it reads
  double seconds;
  double stages[STAGES];  // of the convolutions of a chain what all threads together spent in each
};

namespace {

FxpassesStep* noted = nullptr;
int64_t room_of_noted = 0, count_of_noted = 0;
double stage_seconds[STAGES];

inline double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

class StepClock {
 public:
  template <class Values, class StepWords>
  StepClock(const int64_t* words, const Values& values, const StepWords& step) {
    if (count_of_noted >= room_of_noted) return;
    const auto image = values.image_of(step);
    step_at = noted + count_of_noted++;
    *step_at = {words, {image.n, image.h, image.w, image.c}, 0, {}};
    std::fill(stage_seconds, stage_seconds + STAGES, 0.0);
    began = seconds_now();
  }
  ~StepClock() {
    if (!step_at) return;
    step_at->seconds = seconds_now() - began;
    std::copy(stage_seconds, stage_seconds + STAGES, step_at->stages);
  }

 private:
  FxpassesStep* step_at = nullptr;
  double began = 0;
};

class StageClock {
 public:
  explicit StageClock(size_t which) : which((int64_t)which), began(seconds_now()) {}
  ~StageClock() {
    if (which >= STAGES) return;
    const double taken = seconds_now() - began;
#pragma omp atomic
    stage_seconds[which] += taken;
  }

 private:
  int64_t which;
  double began;
};

}  // namespace

extern "C" {
// Has the calls that follow note their steps there, at most `room` of them; how many were noted where it was before.
int64_t fxpasses_note_steps(FxpassesStep* steps, int64_t room) {
  const int64_t count = count_of_noted;
  noted = steps, room_of_noted = room, count_of_noted = 0;
  return count;
}
}

#else

namespace {

struct StepClock {
  template <class Values, class StepWords>
  StepClock(const int64_t*, const Values&, const StepWords&) {}
};

struct StageClock {
  explicit StageClock(size_t) {}
};

}  // namespace

#endif
