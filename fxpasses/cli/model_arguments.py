"""What commands over a model take: its specification, its inputs, whether it trains, and options."""

from __future__ import annotations

import argparse
import ast
import contextlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fxpasses.errors import FxpassesError, unknown_name

if TYPE_CHECKING:
    import torch

SPEC_HELP = (
    "timm:NAME, torchvision:NAME, transformers:CLASS, or package.module:factory, which names a function that "
    "takes no arguments and returns a module; the current directory is importable"
)


def add_model(parser: argparse.ArgumentParser, *, required: bool, trains: bool = True) -> None:
    """Adds a model's arguments to a command's parser.

    Args:
        parser: the command's.
        required: whether the command needs a model.
        trains: whether the command takes a model in training, too.
    """
    parser.add_argument("spec", metavar="SPEC", nargs=None if required else "?", help=SPEC_HELP)
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        required=required,
        type=InputSpec.parse,
        metavar="SHAPE[:DTYPE]",
        help="sizes of one argument, such as 1,3,224,224 or 1,128:int64; once for each argument",
    )
    if trains:
        mode = parser.add_mutually_exclusive_group()
        mode.add_argument("--train", action="store_true", help="gradients on, batch norms in eval mode")
        mode.add_argument(
            "--full-train", action="store_true", help="gradients on, batch norms in training mode"
        )
    parser.add_argument("--dtype", default="float32", help="floating dtype of model and inputs (float32)")


@dataclass(frozen=True)
class InputSpec:
    """One argument of the model: sizes, and a dtype or None for that of the model."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None

    @staticmethod
    def parse(text: str) -> InputSpec:
        """Reads ``"1,3,224,224"`` or ``"1,128:int64"``.

        Raises:
            argparse.ArgumentTypeError: it is neither.
        """
        found = re.fullmatch(r"(\d+(?:,\d+)*)(?::(\w+))?", text)
        if found is None:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not sizes with commas between them and, if need be, a dtype: 1,3,224,224 or "
                "1,128:int64"
            )
        shape = tuple(int(size) for size in found[1].split(","))
        try:
            return InputSpec(shape, dtype_of(found[2]) if found[2] else None)
        except FxpassesError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    def build(self, default: torch.dtype) -> torch.Tensor:
        """Random values; of integers only 0 and 1, which index into anything."""
        import torch

        dtype = self.dtype or default
        if dtype.is_floating_point or dtype.is_complex:
            return torch.randn(self.shape, dtype=dtype)
        return torch.randint(0, 2, self.shape).to(dtype)


def dtype_of(name: str) -> torch.dtype:
    import torch

    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        names = [
            str(value).removeprefix("torch.") for value in vars(torch).values() if type(value) is torch.dtype
        ]
        raise FxpassesError(unknown_name("dtype", name, names))
    return found


def option_of(text: str) -> tuple[str, object]:
    """``"limit=3"`` as key and value: a Python literal, names with commas between them, or a word."""
    key, equals, given = text.partition("=")
    if not equals:
        raise FxpassesError(f"--options takes KEY=VALUE, such as profit=always; got {text!r}.")
    if key in ("passes", "disable"):
        return key, tuple(name.strip() for name in given.split(",") if name.strip())
    try:
        return key, ast.literal_eval(given)
    except (SyntaxError, ValueError):
        return key, given


def failure_of(model: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> FxpassesError | None:
    """Why a model that could not be traced does not run at all; None where it runs."""
    try:
        model(*inputs)
    except Exception as error:
        shapes = ", ".join(f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in inputs)
        found = f"{type(error).__name__}: {error}"
        return FxpassesError(f"the model does not run on {shapes}: {found} (see --input, --dtype)")
    return None


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds `--options` to a command's parser."""
    parser.add_argument(
        "--options",
        action="extend",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="fields of fxpasses.Options, such as profit=always or disable=efficient_conv_bn_eval",
    )


@contextlib.contextmanager
def current_directory_importable() -> Iterator[None]:
    """Lets `package.module:factory` name a module beside the user, as `python -m` would."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
