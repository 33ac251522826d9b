"""Readers of raw memory: operators whose result tells in which strides and at which offset a tensor lies.

A rewrite or a layout that is right for values may still be wrong for one of them. `READERS` has one of every
kind; each takes a floating-point tensor [N, C, ...] of at least 3 axes and gives tensors. `SECOND_READERS`
are those that every front end can capture beside another reader of the same tensor.

Operators of the library `fxpasses_testing` stand for those of users, with every tag by which torch lets an
operator say what it needs. No gradient flows through them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from hypothesis import strategies as st

Tensor = torch.Tensor
Reader = Callable[[Tensor], Any]

_SAME = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16}
_HALF = {torch.float64: torch.int32, torch.float32: torch.int16, torch.bfloat16: torch.int8}
"""Integers of the same width, and of half of it: a view as these needs the last axis to be dense."""


def _memory(y: Tensor) -> Tensor:
    """A tensor's elements in the order in which they lie in memory, where it has no gaps."""
    return y.as_strided((y.numel(),), (1,), y.storage_offset()).clone()


def _vector_like(y: Tensor) -> Tensor:
    return y.new_empty(y.numel())


def _operator(name: str, *tags: torch.Tag) -> Reader:
    """An operator that gives the raw memory of what it reads."""
    made = torch.library.custom_op(
        f"fxpasses_testing::{name}", _memory, mutates_args=(), schema="(Tensor y) -> Tensor", tags=tags
    )
    made.register_fake(_vector_like)
    made.register_autograd(lambda ctx, grad: None)
    return lambda y: made(y)  # a function, since models are copied with their readers


@torch.library.custom_op("fxpasses_testing::flexible", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def _flexible(y: Tensor) -> Tensor:
    return y.reshape(-1) * 2


_flexible.register_fake(_vector_like)
_flexible.register_autograd(lambda ctx, grad: None)


@torch.library.custom_op("fxpasses_testing::strides", mutates_args=())
def _strides(y: Tensor) -> Tensor:
    return torch.tensor([*y.stride(), y.storage_offset()])


_strides.register_fake(lambda y: torch.empty(y.dim() + 1, dtype=torch.int64))
_strides.register_autograd(lambda ctx, grad: None)


@torch.library.custom_op("fxpasses_testing::copy_memory", mutates_args=("out",))
def _copy_memory(y: Tensor, out: Tensor) -> None:
    out.copy_(_memory(y)[:8])


@torch.library.custom_op("fxpasses_testing::write_memory", mutates_args=("y",))
def _write_memory(y: Tensor) -> None:
    y.as_strided((5,), (1,), y.storage_offset()).add_(1)


for _name, _function in {"memory": _memory, "doubled": lambda y: torch.empty_like(y).copy_(y * 2)}.items():
    torch.library.define(f"fxpasses_testing_untagged::{_name}", "(Tensor y) -> Tensor")
    torch.library.impl(f"fxpasses_testing_untagged::{_name}", "CPU", _function)
torch.library.register_fake("fxpasses_testing_untagged::memory", _vector_like)
torch.library.register_fake("fxpasses_testing_untagged::doubled", torch.empty_like)


_contiguous = _operator("contiguous", torch.Tag.needs_contiguous_strides)


def _into_out(y: Tensor) -> tuple[Tensor, Tensor]:
    out = y.new_zeros(8)
    _copy_memory(y.detach(), out)
    return y * 2, out


def _in_place(y: Tensor) -> Tensor:
    z = y.detach() * 2
    _write_memory(z)
    return z


def _written_window(y: Tensor) -> Tensor:
    z = y * 2
    z.as_strided((4,), (1,), 1).mul_(3)
    return z


def _written_pair(y: Tensor) -> Tensor:
    z = y * 2
    z.as_strided((2,), (1,)).mul_(3)
    return z


def _resized(y: Tensor) -> Tensor:
    z = y.detach() * 2
    return z.resize_(4, 5)


def _narrow(y: Tensor) -> Tensor:
    integers = y.detach().view((_HALF if y.stride(-1) == 1 else _SAME)[y.dtype])
    return torch.bitwise_xor(integers, 0).view(y.dtype)


def _complex(y: Tensor) -> Tensor:
    wide = y.float() if y.dtype == torch.bfloat16 else y
    return torch.complex(wide, wide * 2)


def _spectrum(y: Tensor) -> Any:
    return torch.fft.ifft2(torch.fft.fft2(y.float() if y.dtype == torch.bfloat16 else y))


@torch.compiler.disable  # type: ignore[untyped-decorator]  # written without types
def _in_eager(z: Tensor) -> tuple[Tensor, Tensor]:
    return _memory(z.detach()), z.as_strided((3,), (1,))


def _handed_over(y: Tensor) -> Any:
    return _in_eager(y * 1.5)


def _set(y: Tensor) -> Tensor:
    empty: Any = torch.empty(0, dtype=y.dtype, device=y.device)
    return cast(Tensor, empty.set_(y.detach() * 2))


def _storage(y: Tensor) -> Tensor:
    return torch.empty(0, dtype=y.dtype).set_((y.detach() * 2).untyped_storage(), 0, (4,), (1,))


READERS: Mapping[str, Reader] = {
    "operator": _operator("memory"),
    "operator of exact strides": _operator("exact", torch.Tag.needs_exact_strides),
    "operator of a fixed order": _operator("order", torch.Tag.needs_fixed_stride_order),
    "operator of contiguous operands": lambda y: _contiguous(y.contiguous()),
    "operator of any layout": lambda y: _flexible(y),
    "operator without a tag": lambda y: torch.ops.fxpasses_testing_untagged.memory(y.detach()),
    "operator that follows": lambda y: torch.ops.fxpasses_testing_untagged.doubled(y.detach()),
    "operator that writes": _into_out,
    "operator in place": _in_place,
    "strides": lambda y: _strides(y),
    "strides of a slice": lambda y: _strides(y[:, 1:]),
    "strides of a sum": lambda y: _strides(y * 2 + 1),
    "as_strided": lambda y: y.as_strided((3, 5), (4, 1), 2),
    "as_strided of a slice": lambda y: (y * 2)[1:].as_strided((3, 4), (3, 1)),
    "as_strided at an offset": lambda y: (y * 2)[:, 1:].as_strided((3, 5), (4, 1), 1),
    "as_strided of a transposition": lambda y: y.transpose(1, -1).as_strided((3, 5), (4, 1)),
    "as_strided of a roll": lambda y: y.roll(-1, 0).as_strided((3, 5), (4, 1), 0),
    "overlapping as_strided": lambda y: y.roll(-1, 0).as_strided((5, 6), (4, 1), 0),
    "as_strided_scatter": lambda y: torch.as_strided_scatter(y.detach() * 2, y.new_ones(3), (3,), (1,), 3),
    "write to as_strided": _written_window,
    "view as integers": _narrow,
    "view as complex": lambda y: torch.view_as_complex(torch.view_as_real(_complex(y)) * 2).real,
    "view as real": lambda y: torch.view_as_real(_complex(y)),
    "real part": lambda y: _complex(y).real,
    "imaginary part": lambda y: _complex(y).imag,
    "spectrum": lambda y: _spectrum(y).real,
    "resize": _resized,
    "set": _set,
    "storage": _storage,
    "graph break": _handed_over,
    "transposed": lambda y: y.transpose(1, -1),
    "slice": lambda y: y[:, 1:],
    "every other": lambda y: (y * 2)[..., ::2],
    "part and whole": lambda y: (y, y[1:]),
    "split": lambda y: torch.split(y, 2, 1),
    "expanded": lambda y: y[:, :1].expand(-1, 3, *y.shape[2:]),
    "diagonal": lambda y: y.diagonal(0, 0, -1),
    "unfolded": lambda y: y.unfold(1, 2, 1),
    "random like it": lambda y: y + torch.rand_like(y),
    "dropout": lambda y: torch.nn.functional.dropout(y, 0.5, training=True),
}
"""Readers by what they read with."""

SECOND_READERS: Mapping[str, Reader] = {
    "sin": torch.sin,
    "operator": READERS["operator"],
    "operator of a fixed order": READERS["operator of a fixed order"],
    "strides": READERS["strides"],
    "as_strided": lambda y: (y * 2).as_strided((2,), (1,)),
    "write to as_strided": _written_pair,
    "view as complex": lambda y: torch.view_as_complex(torch.stack([y, y * 2], -1)).real,
    "transposed": READERS["transposed"],
}
"""Readers that stand beside the one that a rule looks for; the first is an ordinary one."""

_OF_MATRICES = ("sin", "operator", "strides", "transposed")


def second_reader(draw: st.DrawFn, rank: int) -> Reader:
    """One that takes a tensor of `rank` axes."""
    return SECOND_READERS[draw(st.sampled_from(list(SECOND_READERS) if rank > 2 else _OF_MATRICES))]
