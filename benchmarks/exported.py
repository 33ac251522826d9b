"""A baked program against the plain one, as AOTInductor's packages that a C++ program runs, without Python.

    python -m benchmarks.exported [--model resnet50] [--launches 4]

The runner is compiled against this torch, loads a package, and prints what calls took. Each launch starts it
once for either package, in random order; a launch's figure is the median over its calls.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

import fxpasses
from benchmarks.models.cases import Case, build_inputs, build_model
from benchmarks.shared.commands import refuse
from benchmarks.shared.environment import physical_cores
from benchmarks.shared.statistics import paired_ratio
from fxpasses.errors import FxpassesError
from fxpasses.torch_internals.inductor import compile_ahead

_RUNNER = r"""
#include <ATen/Parallel.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>

// PACKAGE THREADS CALLS N C H W
int main(int count, char** given) {
  torch::NoGradGuard no_grad;
  at::set_num_threads(std::atoi(given[2]));
  torch::inductor::AOTIModelPackageLoader loader(given[1]);
  std::vector<int64_t> sizes;
  for (int at = 4; at < count; at++) sizes.push_back(std::atoll(given[at]));
  torch::manual_seed(0);
  const std::vector<at::Tensor> inputs{torch::randn(sizes)};
  for (int call = -5; call < std::atoi(given[3]); call++) {
    const auto start = std::chrono::steady_clock::now();
    const auto results = loader.run(inputs);
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    if (call >= 0) std::printf("%.9f %.6e\n", taken.count(), results[0].abs().sum().item<double>());
  }
}
"""


def build_runner(folder: Path) -> Path:
    """The C++ program.

    Raises:
        subprocess.CalledProcessError: it does not compile.
    """
    source, runner = folder / "runner.cpp", folder / "runner"
    source.write_text(_RUNNER, encoding="utf-8")
    libraries = library_paths()
    command = [os.environ.get("CXX", "g++"), "-std=c++20", "-O1", str(source), "-o", str(runner)]
    command += [f"-I{path}" for path in include_paths()]
    command += [part for path in libraries for part in (f"-L{path}", f"-Wl,-rpath,{path}")]
    subprocess.run([*command, "-ltorch", "-ltorch_cpu", "-lc10"], check=True, capture_output=True, text=True)
    return runner


def run(runner: Path, package: Path, case: Case, calls: int, sizes: Sequence[int]) -> tuple[float, float]:
    """The median seconds of a call, and the sum of what it gives."""
    command = [str(runner), str(package), str(case.threads), str(calls), *map(str, sizes)]
    environment = os.environ | {"OMP_NUM_THREADS": str(case.threads)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    rows = [tuple(map(float, line.split())) for line in done.stdout.splitlines()]
    return statistics.median(row[0] for row in rows), rows[-1][1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints both times and their ratio; gives 0, 1 where the results differ, or 2 for wrong arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.exported", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--model", default="resnet50", help="default: resnet50")
    parser.add_argument("--launches", type=int, default=4, help="of either package; default: 4")
    parser.add_argument("--calls", type=int, default=30, help="in a launch; default: 30")
    given = parser.parse_args(arguments)
    try:
        if min(given.launches, given.calls) < 1:
            raise FxpassesError("--launches and --calls must be at least 1.")
        case = Case(given.model, mode="inference", threads=physical_cores())
        model = build_model(case, None)
    except FxpassesError as error:
        refuse(parser, str(error))
    inputs = build_inputs(case, model)
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        folder = Path(name)
        runner = build_runner(folder)
        program = torch.export.export(model, inputs)
        baked = fxpasses.optimize(program, options={"weights": "baked"}).exported_program
        assert baked is not None
        packages = {"plain": program, "baked": baked}
        paths = {which: folder / f"{which}.pt2" for which in packages}
        for which, exported in packages.items():
            compile_ahead(exported, paths[which])
        times: dict[str, list[float]] = {which: [] for which in packages}
        sums: dict[str, float] = {}
        for _ in range(given.launches):
            for which in random.sample(list(packages), len(packages)):
                seconds, sums[which] = run(runner, paths[which], case, given.calls, inputs[0].shape)
                times[which].append(seconds)
    for which, seconds in times.items():
        print(f"{which}: {1e3 * statistics.median(seconds):.2f} ms")
    ratio = paired_ratio(times["baked"], times["plain"])
    interval = "" if ratio.low is None else f" [{ratio.low:.3f}, {ratio.high:.3f}]"
    print(f"plain / baked: {ratio.value:.3f}{interval}, {given.launches} launches of {given.calls} calls")
    equal = abs(sums["plain"] - sums["baked"]) <= 1e-4 * abs(sums["plain"])
    print("results are equal" if equal else f"results differ: {sums}")
    return 0 if equal else 1


if __name__ == "__main__":
    raise SystemExit(main())
