"""The text notation of operator inputs: what a line of an operator log means, read without running it.

The notation is PyTorch's (benchmarks/dynamo/microbenchmarks/operator_inp_utils.py), a subset of Python's:

    ((T([8, 64, 56, 56], f16), T([64, 64, 3, 3], f16, stride=(576, 1, 192, 64)), None, [1]), {'dtype': f32})

is a pair of the positional and the keyword arguments; `T(shape, dtype, stride)` stands for a strided tensor,
`ST(shape, dtype, layout, coalesced, nnz)` for a sparse one, `f16` for a dtype, `torch.strided` for a layout.

A log is data from elsewhere. It is parsed by Python's `ast` and translated node by node: whatever is not in
the tables below is refused, and nothing is ever evaluated, imported or called.
"""

from __future__ import annotations

import ast
import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch

from fxpasses.errors import FxpassesError

MAXIMUM_LINE = 1 << 20
"""Characters of a line: the longest published one, an optimiser's list of tensors, has about 40,000."""
MAXIMUM_DEPTH = 16
"""Brackets within brackets: the published logs need 5."""
MAXIMUM_DIMENSIONS = 64
"""Dimensions of a tensor, which is torch's own limit."""

DTYPES: dict[str, torch.dtype] = {
    "b8": torch.bool,
    "bf16": torch.bfloat16,
    "c32": torch.complex32,
    "c64": torch.complex64,
    "c128": torch.complex128,
    "f16": torch.float16,
    "f32": torch.float32,
    "f64": torch.float64,
    "f8e4m3fn": torch.float8_e4m3fn,
    "f8e4m3fnuz": torch.float8_e4m3fnuz,
    "f8e5m2": torch.float8_e5m2,
    "f8e5m2fnuz": torch.float8_e5m2fnuz,
    "i8": torch.int8,
    "i16": torch.int16,
    "i32": torch.int32,
    "i64": torch.int64,
    "u8": torch.uint8,
    "u16": torch.uint16,
    "u32": torch.uint32,
    "u64": torch.uint64,
}
ABBREVIATIONS = {dtype: name for name, dtype in DTYPES.items()}
_NAMES: dict[str, Value] = {**DTYPES, "inf": math.inf, "nan": math.nan}
_TORCH_CONSTANTS = (torch.dtype, torch.layout, torch.memory_format)
_CHARACTERS = re.compile(r"[\w\s\[\](){},:'\".=+-]*", re.ASCII)
_SIGNS = re.compile(r"[-+]\s*[-+]")
_WORDS = re.compile(r"\b(?:lambda|if|else|for|not|and|or|in|is|await|yield|async)\b")


@dataclass(frozen=True)
class TensorSpec:
    """A strided tensor without its values; `stride` is None where it is contiguous."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...] | None = None

    @property
    def storage_elements(self) -> int:
        """The elements that its storage needs: fewer than the shape's where strides overlap."""
        if 0 in self.shape:
            return 0
        if self.stride is None:
            return math.prod(self.shape)
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))

    @property
    def storage_bytes(self) -> int:
        """The bytes that its storage needs."""
        return self.storage_elements * self.dtype.itemsize


@dataclass(frozen=True)
class SparseSpec:
    """A sparse tensor without its values: read, kept and written, never materialised."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: torch.layout
    coalesced: bool
    nonzeros: int | None = None


Scalar: TypeAlias = (
    "bool | int | float | complex | str | torch.dtype | torch.layout | torch.memory_format"
    " | torch.device | TensorSpec | SparseSpec | None"
)
Value: TypeAlias = "Scalar | list[Value] | tuple[Value, ...] | dict[str, Value]"


@dataclass(frozen=True)
class Call:
    """The arguments of one operator call."""

    args: tuple[Value, ...]
    kwargs: Mapping[str, Value]

    def leaves(self) -> list[Value]:
        """Every value that is not a container, in the order in which it is written."""
        return _leaves([list(self.args), dict(self.kwargs)])

    def tensors(self) -> list[TensorSpec]:
        """The strided tensors among the arguments."""
        return [leaf for leaf in self.leaves() if isinstance(leaf, TensorSpec)]

    @property
    def sparse(self) -> bool:
        """Whether an argument is a sparse tensor."""
        return any(isinstance(leaf, SparseSpec) for leaf in self.leaves())


class NotationError(FxpassesError, ValueError):
    """Text that is not in the notation; the message says which part, and what is expected there."""


def parse_call(text: str) -> Call:
    """Reads a pair of positional and keyword arguments.

    Raises:
        NotationError: the text is not such a pair, is too long or too deep, or holds anything but literals,
            `T(...)`, `ST(...)`, `device(...)`, dtype abbreviations, `inf`, `nan` and `torch.` constants.
    """
    try:
        pair = _value(_expression(text))
    except RecursionError:
        raise NotationError("the expression nests too deep") from None
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise NotationError("expected a pair ((positional, arguments), {'keyword': argument})")
    args, kwargs = pair
    if not isinstance(args, tuple) or not isinstance(kwargs, dict):
        raise NotationError(
            f"expected a tuple and a dictionary, got a {type(args).__name__} and a {type(kwargs).__name__}"
        )
    return Call(args, kwargs)


def format_call(call: Call) -> str:
    """Writes `call` so that `parse_call`, and PyTorch's loader, read the same arguments back."""
    return f"({format_value(call.args)}, {format_value(dict(call.kwargs))})"


def format_value(value: Value) -> str:
    """Writes one value in the notation."""
    if isinstance(value, tuple):
        inner = ", ".join(format_value(item) for item in value)
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, list):
        return "[" + ", ".join(format_value(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {format_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, torch.dtype):
        return ABBREVIATIONS.get(value, str(value))
    if isinstance(value, torch.device):
        return repr(value.type)
    if isinstance(value, TensorSpec):
        stride = "" if value.stride is None else f", stride={format_value(value.stride)}"
        return f"T({format_value(list(value.shape))}, {format_value(value.dtype)}{stride})"
    if isinstance(value, SparseSpec):
        nonzeros = "" if value.nonzeros is None else f", {value.nonzeros}"
        shape, dtype = format_value(list(value.shape)), format_value(value.dtype)
        return f"ST({shape}, {dtype}, {value.layout}, {value.coalesced}{nonzeros})"
    return repr(value)


def _leaves(value: Value) -> list[Value]:
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in _leaves(item)]
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    return [value]


def _expression(text: str) -> ast.expr:
    """The syntax tree of `text`, after the checks that keep the parser itself from harm."""
    text = text.strip()
    if len(text) > MAXIMUM_LINE:
        raise NotationError(f"{len(text):,} characters, above the limit of {MAXIMUM_LINE:,}")
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    if deepest > MAXIMUM_DEPTH:
        raise NotationError(f"brackets nest {deepest:,} deep, above the limit of {MAXIMUM_DEPTH}")
    if not _CHARACTERS.fullmatch(text) or _SIGNS.search(text) or _WORDS.search(text):
        raise NotationError("an operator, keyword or character that no argument needs")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise NotationError(f"not a Python expression ({str(error) or type(error).__name__})") from None


def _value(node: ast.expr) -> Value:
    if isinstance(node, ast.Constant):
        return _constant(node)
    if isinstance(node, ast.Tuple):
        return tuple(_value(element) for element in node.elts)
    if isinstance(node, ast.List):
        return [_value(element) for element in node.elts]
    if isinstance(node, ast.Dict):
        return dict(_item(key, item) for key, item in zip(node.keys, node.values, strict=True))
    if isinstance(node, ast.Name) and node.id in _NAMES:
        return _NAMES[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_number(node.operand)
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub)):
        return _complex(node)
    if isinstance(node, ast.Attribute):
        return _torch_constant(node)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _CALLS:
        return _CALLS[node.func.id](node)
    raise NotationError(f"{_shown(node)} is none of the values that the notation has")


def _constant(node: ast.Constant) -> Value:
    if isinstance(node.value, str):
        return DTYPES.get(node.value, node.value)  # PyTorch's writer leaves the quotes of some dtypes
    if isinstance(node.value, int) and not -(2**63) <= node.value < 2**63:
        raise NotationError(f"an integer of {node.value.bit_length()} bits; an argument has at most 64")
    if node.value is None or isinstance(node.value, (bool, int, float, complex)):
        return node.value
    raise NotationError(f"{_shown(node)} is none of the values that the notation has")


def _number(node: ast.expr) -> int | float | complex:
    value = _value(node)
    if isinstance(value, bool) or not isinstance(value, (int, float, complex)):
        raise NotationError(f"a sign stands before a number, not before {_shown(node)}")
    return value


def _complex(node: ast.BinOp) -> complex:
    real, imaginary = _number(node.left), _number(node.right)
    if isinstance(real, complex) or not isinstance(imaginary, complex):
        raise NotationError(f"{_shown(node)} is neither a literal nor a complex number")
    return real + imaginary if isinstance(node.op, ast.Add) else real - imaginary


def _item(key: ast.expr | None, value: ast.expr) -> tuple[str, Value]:
    if not isinstance(key, ast.Constant) or not isinstance(key.value, str):
        raise NotationError("the keys of a dictionary are names in quotes")
    return key.value, _value(value)


def _torch_constant(node: ast.Attribute) -> Value:
    if isinstance(node.value, ast.Name) and node.value.id in ("torch", "th"):
        constant = getattr(torch, node.attr, None)
        if isinstance(constant, _TORCH_CONSTANTS):
            return constant
    raise NotationError(f"{_shown(node)} is no dtype, layout or memory format of torch")


def _bound(node: ast.Call, names: tuple[str, ...], required: int) -> dict[str, Value]:
    """The arguments of a call in the notation, by name."""
    given = dict(zip(names, (_value(argument) for argument in node.args), strict=False))
    for keyword in node.keywords:
        if keyword.arg not in names or keyword.arg in given:
            raise NotationError(f"{_shown(node)}: {keyword.arg!r} is unknown or given twice")
        given[keyword.arg] = _value(keyword.value)
    if len(node.args) > len(names) or not set(names[:required]) <= set(given):
        raise NotationError(f"{_shown(node)}: expected ({', '.join(names)}), the first {required} required")
    return given


def _tensor(node: ast.Call) -> TensorSpec:
    given = _bound(node, ("shape", "dtype", "stride"), 2)
    shape, dtype = _sizes(node, given["shape"]), _dtype(node, given["dtype"])
    stride = None if given.get("stride") is None else _sizes(node, given["stride"])
    if stride is not None and len(stride) != len(shape):
        raise NotationError(f"{_shown(node)}: {len(shape)} sizes but {len(stride)} strides")
    return TensorSpec(shape, dtype, stride)


def _sparse(node: ast.Call) -> SparseSpec:
    given = _bound(node, ("shape", "dtype", "layout", "is_coalesced", "nnz"), 4)
    layout, coalesced, nonzeros = given["layout"], given["is_coalesced"], given.get("nnz")
    if not isinstance(layout, torch.layout) or not isinstance(coalesced, bool):
        raise NotationError(f"{_shown(node)}: expected ST([sizes], dtype, torch.sparse_coo, True or False)")
    if nonzeros is not None and not isinstance(nonzeros, int):
        raise NotationError(f"{_shown(node)}: the number of nonzeros is an integer")
    return SparseSpec(_sizes(node, given["shape"]), _dtype(node, given["dtype"]), layout, coalesced, nonzeros)


def _device(node: ast.Call) -> str:
    kind = _bound(node, ("type", "index"), 1)["type"]
    if not isinstance(kind, str):
        raise NotationError(f"{_shown(node)}: the type of a device is a name in quotes")
    return kind


def _sizes(node: ast.Call, value: Value) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)) or len(value) > MAXIMUM_DIMENSIONS:
        raise NotationError(f"{_shown(node)}: sizes and strides are lists of at most {MAXIMUM_DIMENSIONS}")
    sizes = [item for item in value if isinstance(item, int) and not isinstance(item, bool) and item >= 0]
    if len(sizes) != len(value):
        raise NotationError(f"{_shown(node)}: sizes and strides are integers of at least 0")
    return tuple(sizes)


def _dtype(node: ast.Call, value: Value) -> torch.dtype:
    if not isinstance(value, torch.dtype):
        raise NotationError(f"{_shown(node)}: expected a dtype such as f32; valid: {', '.join(DTYPES)}")
    return value


def _shown(node: ast.expr) -> str:
    """The text of a part, cut to what a message can hold."""
    text = ast.unparse(node)
    return text if len(text) <= 80 else f"{text[:77]}..."


_CALLS: dict[str, Callable[[ast.Call], Value]] = {"T": _tensor, "ST": _sparse, "device": _device}
