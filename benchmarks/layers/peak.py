"""The peaks of this machine: those that `fxpasses.devices` measures, and that of a loop of products.

    sum[i] = a * b + sum[i]     for twelve vectors i, of which none waits for another

A matrix product of the library that torch calls may stay far below what that loop reaches, as on CPUs that
the library was not written for.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from fxpasses.devices.measuring import Measurer
from fxpasses.devices.timing import Effort
from fxpasses.kernels import build
from fxpasses.torch_internals.cpp import compile_cpp

_CHAINS, _ROUNDS, _TRIES = 12, 50_000, 40
_LOOP = f"""
#include <omp.h>
#include <algorithm>
#include <cstdint>

extern "C" int fma_lanes() {{ return VL; }}

// Seconds of so many rounds in each thread, the best of several tries.
extern "C" double fma_seconds(int threads, int64_t rounds, int tries, float a, float b, float* result) {{
  double best = 1e9;
  for (int at = 0; at < tries; at++) {{
    double longest = 0;
#pragma omp parallel num_threads(threads) reduction(max : longest)
    {{
      Vec sum[{_CHAINS}];
      for (Vec& one : sum) one = splat(a);
      const Vec first = splat(a), second = splat(b);
#pragma omp barrier
      const double start = omp_get_wtime();
      for (int64_t round = 0; round < rounds; round++)
#pragma GCC unroll {_CHAINS}
        for (int i = 0; i < {_CHAINS}; i++) sum[i] = fma(first, second, sum[i]);
      longest = omp_get_wtime() - start;
      Vec all = Vec{{}};
      for (const Vec& one : sum) all += one;
      if (omp_get_thread_num() == 0) store(result, all);
    }}
    best = std::min(best, longest);
  }}
  return best;
}}
"""


_EFFORT = Effort(rounds=15, sample_seconds=5e-3, case_seconds=3.0, least=7)


@dataclass(frozen=True)
class Peaks:
    """What the machine can do at so many threads, in a second.

    Attributes:
        fma_flops: operations of the loop; 0 where it cannot be compiled.
        matmul_flops, convolution_flops, bandwidth: as in `fxpasses.devices.profile.Roofline`.
    """

    fma_flops: float
    matmul_flops: float
    convolution_flops: float
    bandwidth: float

    @property
    def flops(self) -> float:
        """The most operations."""
        return max(self.fma_flops, self.matmul_flops, self.convolution_flops)

    def best_with(self, other: Peaks) -> Peaks:
        """The better of each, as whatever else runs only lowers them."""
        return Peaks(
            max(self.fma_flops, other.fma_flops),
            max(self.matmul_flops, other.matmul_flops),
            max(self.convolution_flops, other.convolution_flops),
            max(self.bandwidth, other.bandwidth),
        )


def measured_peaks() -> Peaks:
    """The peaks in float32 with torch's threads."""
    roofline = Measurer(torch.device("cpu"), torch.float32, _EFFORT).peaks()
    return Peaks(fma_flops() or 0.0, roofline.matmul_flops, roofline.convolution_flops, roofline.bandwidth)


def fma_flops() -> float | None:
    """Operations a second of all threads together; None without vectors of ours or a compiler."""
    vectors = torch.backends.cpu.get_cpu_capability()
    if vectors not in build.VECTOR_FLAGS:
        return None
    library = compile_cpp(build.source("vectors.h") + _LOOP, build.VECTOR_FLAGS[vectors])
    if library is None:
        return None
    seconds_of, threads = library.fma_seconds, torch.get_num_threads()
    seconds_of.restype = ctypes.c_double
    seconds_of.argtypes = (
        *(ctypes.c_int, ctypes.c_int64, ctypes.c_int, ctypes.c_float, ctypes.c_float),
        ctypes.POINTER(ctypes.c_float),
    )
    lanes = int(library.fma_lanes())
    best = seconds_of(threads, _ROUNDS, _TRIES, 0.5, 1e-6, (ctypes.c_float * lanes)())
    return 2 * lanes * _CHAINS * _ROUNDS * threads / float(best)
