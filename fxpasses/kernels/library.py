"""The library of our kernels, loaded: the operators `fxpasses::convolution`, `sequence` and `moments`.

    kernels, compiled for the vectors in force (`build`)   plain C functions over pointers and sizes
    operator.cpp, compiled against this torch              makes operators of them; two seconds

`_define` declares the operators, with what they give for fake tensors.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import torch

from fxpasses.devices.store import user_cache
from fxpasses.kernels import build
from fxpasses.torch_internals.cpp import compile_cpp, cpp_compiler

_CONVOLUTION_SCHEMA = (
    "(Tensor image, Tensor filters, Tensor? summand, int[] sizes, int kernel, int activation, float low,"
    " float high) -> Tensor"
)
_SEQUENCE_SCHEMA = "(Tensor[] inputs, Tensor[] constants, Tensor program, SymInt[] shapes) -> Tensor[]"

_MOMENTS_SCHEMA = "(Tensor image, int groups) -> Tensor"


@functools.cache
def vector_length() -> int:
    """How many floats a vector of the compiled kernels has; 0 where there are none (`missing`).

    Compiles them when it is called for the first time on a machine, and makes the operators known to torch.
    """
    vectors = torch.backends.cpu.get_cpu_capability()
    if vectors not in build.VECTOR_FLAGS:
        return 0
    _define()
    try:
        compiler = cpp_compiler()
    except RuntimeError:
        compiler = None
    with ThreadPoolExecutor(1) as other:
        found = other.submit(_kernels, vectors, compiler)
        # Two compilers at once, where neither library is there yet.
        operators = compile_cpp(build.source(build.OPERATOR))
        kernels = found.result()
    if kernels is None or operators is None:
        return 0
    _use(operators, kernels)
    return int(kernels.fxpasses_vector_length())


def _use(operators: ctypes.CDLL, kernels: ctypes.CDLL) -> None:
    functions = (kernels.fxpasses_convolution, kernels.fxpasses_sequence, kernels.fxpasses_moments)
    operators.fxpasses_use(*(ctypes.cast(function, ctypes.c_void_p) for function in functions))


@contextlib.contextmanager
def kernels_with(*flags: str) -> Iterator[ctypes.CDLL]:
    """The block in which this process's operators call kernels that were compiled with further flags.

    Nothing else changes: what was chosen and stored for the kernels as they are holds for these.

    Yields:
        The library of these kernels.

    Raises:
        RuntimeError: there are no kernels here, or these do not compile.
    """
    if reason := missing():
        raise RuntimeError(f"there are no kernels of fxpasses: {reason}")
    vectors, compiler = torch.backends.cpu.get_cpu_capability(), cpp_compiler()
    operators, plain = compile_cpp(build.source(build.OPERATOR)), _kernels(vectors, compiler)
    assert operators is not None, "there are kernels"
    assert plain is not None, "there are kernels"
    try:
        library = build.cached(vectors, user_cache() / "kernels", compiler, flags)
        kernels = _compiled(library, vectors, compiler, flags)
    except (OSError, subprocess.SubprocessError) as error:
        raise RuntimeError(f"the kernels do not compile with {' '.join(flags)}: {error}") from error
    _use(operators, kernels)
    try:
        yield kernels
    finally:
        _use(operators, plain)


def identity() -> str:
    """What names the kernels that there are, in whichever process; why there are none where there are not."""
    return missing() or _name(torch.backends.cpu.get_cpu_capability())


@functools.cache
def _name(vectors: str) -> str:
    return build.prebuilt(vectors).name


def _kernels(vectors: str, compiler: str | None) -> ctypes.CDLL | None:
    """The library of the kernels: of the package, of the cache, or compiled now; None if that fails."""
    with contextlib.suppress(OSError):  # none was built, or it needs a newer C library than there is here
        return ctypes.CDLL(str(build.prebuilt(vectors)))
    if compiler is None:
        return None
    try:
        library = build.cached(vectors, user_cache() / "kernels", compiler)
        with contextlib.suppress(OSError):  # a folder that cannot be written, or whose files cannot be run
            return _compiled(library, vectors, compiler)
        with tempfile.TemporaryDirectory(prefix="fxpasses_kernels_") as folder:
            return _compiled(Path(folder) / library.name, vectors, compiler)
    except (OSError, subprocess.SubprocessError):
        return None


def _compiled(library: Path, vectors: str, compiler: str, flags: Sequence[str] = ()) -> ctypes.CDLL:
    with contextlib.suppress(OSError):  # not there, or not whole
        return ctypes.CDLL(str(library))
    library.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(library.with_suffix(".lock")):  # or every process would compile the same
        with contextlib.suppress(OSError):
            return ctypes.CDLL(str(library))
        build.compile_kernels(vectors, library, compiler, flags)
    return ctypes.CDLL(str(library))


def missing() -> str:
    """Why there are no kernels; empty where there are."""
    if vector_length():
        return ""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability in build.VECTOR_FLAGS:
        return "they do not compile here"
    return f"they are for {' and '.join(build.VECTOR_FLAGS)}, and torch runs with the vectors of {capability}"


@functools.cache
def _define() -> None:
    torch.library.define(
        "fxpasses::convolution", _CONVOLUTION_SCHEMA, tags=(torch.Tag.needs_fixed_stride_order,)
    )
    torch.library.register_fake("fxpasses::convolution", _fake_convolution)
    torch.library.define("fxpasses::sequence", _SEQUENCE_SCHEMA, tags=(torch.Tag.needs_fixed_stride_order,))
    torch.library.register_fake("fxpasses::sequence", _fake_sequence)
    torch.library.define("fxpasses::moments", _MOMENTS_SCHEMA, tags=(torch.Tag.needs_fixed_stride_order,))
    torch.library.register_fake("fxpasses::moments", _fake_moments)


def _fake_convolution(
    image: torch.Tensor,
    filters: torch.Tensor,
    summand: torch.Tensor | None,
    sizes: Sequence[int],
    kernel: int,
    activation: int,
    low: float,
    high: float,
) -> torch.Tensor:
    count, _, *space = image.shape
    filters_, _, *given = sizes
    if not space:
        return image.new_empty((count, filters_))
    extents = [
        (size + 2 * given[4 + at] - given[6 + at] * (given[at] - 1) - 1) // given[2 + at] + 1
        for at, size in enumerate(space)
    ]
    return torch.empty(
        (count, filters_, *extents),
        dtype=image.dtype,
        device=image.device,
        memory_format=torch.channels_last,
    )


def _fake_moments(image: torch.Tensor, groups: int) -> torch.Tensor:
    return image.new_empty((2, image.shape[0], groups, 1, 1))


def _fake_sequence(
    inputs: Sequence[torch.Tensor],
    constants: Sequence[torch.Tensor],
    program: torch.Tensor,
    shapes: Sequence[int],
) -> list[torch.Tensor]:
    del inputs, program
    like = constants[0]
    made = []
    for n, c, h, w in zip(*(shapes[at::4] for at in range(4)), strict=True):
        if h < 0:
            made.append(like.new_empty((n, c)))
        else:
            made.append(like.new_empty((n, h, w, c)).permute(0, 3, 1, 2))
    return made
