"""Every test starts with empty counters and without a trace of what earlier ones compiled."""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import getpass
import importlib
import os
import shutil
import sys
import tempfile

# Every worker of pytest-xdist runs as many threads as there are cores, and threads that wait by spinning keep
# the other workers from a core: a multiple of the time, with two workers on two cores. OpenMP reads this when
# it is loaded, which may have happened in this process, but not in the workers that it is about to start.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Processes that wait to compile Triton's kernels take seconds to start, and a CPU has nothing for them.
os.environ.setdefault("TORCH_WARM_POOL", "0")

# A third of the time that a kernel of inductor's takes to compile goes into linking it to torch's libraries,
# which gold does in half of that. GCC looks for its linker here first.
if gold := shutil.which("ld.gold"):
    linker = os.path.join(tempfile.gettempdir(), f"fxpasses_{getpass.getuser()}_linker")
    os.makedirs(linker, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.symlink(gold, os.path.join(linker, "ld"))
    os.environ.setdefault("COMPILER_PATH", linker)

# Workers, and processes that tests start, would else compile all modules anew, each of them.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
    sys.dont_write_bytecode = False

# What a machine is measured to be like is another thing on each: tests that measure say so, and where.
# Nor does a run begin with what an earlier one measured, or with a race that was won in it.
os.environ.setdefault("FXPASSES_TUNE_SECONDS", "0")
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers, and what tests start, share the run's
    os.environ["FXPASSES_PROFILE_DIR"] = tempfile.mkdtemp(prefix="fxpasses_profiles_")
    atexit.register(shutil.rmtree, os.environ["FXPASSES_PROFILE_DIR"], ignore_errors=True)

import pytest
import torch

from fxpasses.kernels import build

# What inductor's caches hold is for some vectors, though stock does not ask which, and a remark tells that it
# was made with other kernels of ours: each has caches of its own.
vectors = torch.backends.cpu.get_cpu_capability()
kernels = build.prebuilt(vectors).stem if vectors in build.VECTOR_FLAGS else "none"
usual = os.path.join(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")
directory, _, _ = os.environ.get("TORCHINDUCTOR_CACHE_DIR", usual).partition("_with_")  # as a parent was told
os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{directory}_with_{vectors}_{kernels}"


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(skip)


def pytest_collection_finish():
    """What is loaded by now stays: to search it for garbage again and again took a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def pytest_runtest_setup(item):
    """Compiles the kernels for the first test that needs them, while other workers are at theirs."""
    if item.get_closest_marker("needs_kernels"):
        from fxpasses.kernels.library import missing

        if reason := missing():
            pytest.skip(reason)


@pytest.fixture
def no_code(monkeypatch):
    """The graphs that inductor would generate code for are run operator by operator.

    Its passes and ours inside it run, and so does AOTAutograd's partitioner: for tests of those, without the
    seconds that generating C++ and compiling it take.
    """
    from torch._inductor import config

    module = importlib.import_module("torch._inductor.compile_fx")

    def run_as_it_is(graph_module, inputs, **_):
        def call(given):
            return graph_module(*given)

        call._boxed_call = True
        return call

    compile_fx = functools.partial(module.compile_fx, inner_compile=run_as_it_is)
    monkeypatch.setattr(module, "compile_fx", compile_fx)
    with config.patch(fx_graph_cache=False):
        yield


@pytest.fixture(autouse=True)
def _fresh_state():
    import torch._dynamo

    import fxpasses

    torch._dynamo.reset()
    fxpasses.reset()
    torch.manual_seed(0)
