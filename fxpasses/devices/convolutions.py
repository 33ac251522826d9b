"""One convolution, its gradients, and the implementations that compute them in either layout.

For a convolution with input x, weight W and output gradient g the three directions are

    forward      y  = conv(x, W)
    input_grad   dx = conv_backward(g, x, W)[0]
    weight_grad  dW = conv_backward(g, x, W)[1]

Every 4-D (5-D) operand has the layout under test, weights included, and so has the activation that comes
out: an implementation that leaves it in the other layout pays for the copy. A 1x1 convolution of stride 1 is
also a matrix product over the rows of a channels-last view, [N·H·W, C] · [C, K], written into a reused
buffer. On a CPU the prepacked oneDNN convolution stands for weights that are constant.

One operand is scaled so that every result has about unit variance: an absolute tolerance then means the same
for every shape. Results are judged against the float64 convolution of the same (rounded) operands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from fxpasses.devices.keys import convolution_key
from fxpasses.devices.profile import (
    CONVOLUTION_FORWARD,
    CONVOLUTION_INPUT_GRAD,
    CONVOLUTION_WEIGHT_GRAD,
    Layout,
)
from fxpasses.devices.sizes import ConvolutionSizes
from fxpasses.devices.unsafe import overruns
from fxpasses.errors import FxpassesError
from fxpasses.graph.layouts import memory_format
from fxpasses.torch_internals.sizes import size_hint

aten = torch.ops.aten

Direction = Literal["forward", "input_grad", "weight_grad"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
OPERATORS: dict[Direction, str] = {
    "forward": CONVOLUTION_FORWARD,
    "input_grad": CONVOLUTION_INPUT_GRAD,
    "weight_grad": CONVOLUTION_WEIGHT_GRAD,
}

DIRECTION_OF: dict[str, Direction] = {name: direction for direction, name in OPERATORS.items()}

Kernel = Callable[[], "Tensor | tuple[Tensor, ...]"]
"""What is timed: it returns the results, so that they can be compared first."""

Candidates = dict[tuple[Layout, str], list[Callable[[], Kernel]]]
"""By layout and name of the implementation, what builds its kernel on each set of operands."""


class ConvolutionCaseError(FxpassesError, ValueError):
    """Sizes or arguments that are no convolution."""


@dataclass(frozen=True)
class Convolution:
    """The sizes and arguments of one convolution over 2 or 3 spatial dimensions.

    Attributes:
        input_size: [N, C, *spatial].
        weight_size: [K, C / groups, *kernel]; transposed: [C, K / groups, *kernel].
        stride: one value for each spatial dimension, as are padding, dilation and output_padding.
    """

    input_size: tuple[int, ...]
    weight_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    @classmethod
    def of(
        cls,
        input_size: Sequence[int],
        weight_size: Sequence[int],
        stride: Sequence[int] = (1,),
        padding: Sequence[int] = (0,),
        dilation: Sequence[int] = (1,),
        transposed: bool = False,
        output_padding: Sequence[int] = (0,),
        groups: int = 1,
    ) -> Convolution:
        """A checked convolution; a list of one value stands for all spatial dimensions.

        Raises:
            ConvolutionCaseError: the sizes do not fit each other, or give an empty output.
        """
        spatial = len(input_size) - 2
        if spatial not in (2, 3) or len(weight_size) != len(input_size):
            raise ConvolutionCaseError(
                f"input {list(input_size)} and weight {list(weight_size)} must both have 4 dimensions "
                "(2-D convolution) or both 5 (3-D)."
            )
        lists = {
            name: _expanded(name, values, spatial)
            for name, values in (
                ("stride", stride),
                ("padding", padding),
                ("dilation", dilation),
                ("output_padding", output_padding),
            )
        }
        case = cls(tuple(input_size), tuple(weight_size), transposed=transposed, groups=groups, **lists)
        case._check()
        return case

    @classmethod
    def of_key(cls, key: str) -> Convolution:
        """The convolution of a device profile's row.

        Raises:
            ValueError: it is no key of a convolution.
        """
        words = key.split()
        transposed = words[:1] == ["transposed"]
        try:
            fields = dict(word.split("=") for word in words[transposed:])
            lists = {name: tuple(map(int, text.split("x"))) for name, text in fields.items()}
            space = (lists["stride"], lists["padding"], lists["dilation"])
            output_padding, (groups,) = lists.get("output_padding", (0,)), lists["groups"]
            return cls.of(lists["input"], lists["weight"], *space, transposed, output_padding, groups)
        except (KeyError, ValueError) as error:  # one of ours among them
            raise ValueError(f"{key!r} is no key of a convolution") from error

    @classmethod
    def at_hints(cls, sizes: ConvolutionSizes) -> Convolution:
        """The convolution of a graph, its symbolic sizes as they were when it was traced.

        Raises:
            ConvolutionCaseError: as `of`.
        """
        stride, padding, dilation, transposed, output_padding, groups = sizes.arguments
        lists = (sizes.input, sizes.weight, stride, padding, dilation, output_padding)
        input_size, weight_size, *space, output = [tuple(map(size_hint, values)) for values in lists]
        return cls.of(
            input_size, weight_size, space[0], space[1], space[2], bool(transposed), output, size_hint(groups)
        )

    @property
    def output_size(self) -> tuple[int, ...]:
        """[N, K, *spatial] of the result."""
        sizes = [self.input_size[0], self.output_channels]
        for d, size in enumerate(self.input_size[2:]):
            window = self.dilation[d] * (self.weight_size[2 + d] - 1)
            if self.transposed:
                out = (size - 1) * self.stride[d] - 2 * self.padding[d] + window + self.output_padding[d] + 1
            else:
                out = (size + 2 * self.padding[d] - window - 1) // self.stride[d] + 1
            sizes.append(out)
        return tuple(sizes)

    @property
    def output_channels(self) -> int:
        """K."""
        return self.weight_size[1] * self.groups if self.transposed else self.weight_size[0]

    @property
    def flops(self) -> int:
        """Multiplications and additions of one direction: each of the three has as many, borders included."""
        positions = self.input_size if self.transposed else self.output_size
        # Each position of one channel meets the kernel of every channel of its group on the other side.
        return 2 * math.prod(positions) * math.prod(self.weight_size[1:])

    @property
    def is_matrix_product(self) -> bool:
        """Whether it is a 1x1 convolution that a plain matrix product over all rows computes."""
        return (
            not self.transposed
            and self.groups == 1
            and set(self.weight_size[2:]) == {1}
            and set(self.stride) == {1}
            and set(self.padding) == {0}
        )

    @property
    def key(self) -> str:
        """The key under which a device profile stores it."""
        return convolution_key(
            self.input_size,
            self.weight_size,
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups,
        )

    @property
    def arguments(self) -> tuple[list[int], list[int], list[int], bool, list[int], int]:
        """What `aten.convolution` takes after the bias."""
        return (
            list(self.stride),
            list(self.padding),
            list(self.dilation),
            self.transposed,
            list(self.output_padding),
            self.groups,
        )

    def reduced(self, direction: Direction) -> float:
        """About how many products one element of the result sums up."""
        output = {
            "forward": self.output_size,
            "input_grad": self.input_size,
            "weight_grad": self.weight_size,
        }[direction]
        return max(1.0, self.flops / 2 / math.prod(output))

    def _check(self) -> None:
        channels = self.weight_size[0] if self.transposed else self.weight_size[1] * self.groups
        if min(self.input_size + self.weight_size + self.stride + self.dilation) < 1 or self.groups < 1:
            raise ConvolutionCaseError(f"{self.key}: sizes, stride, dilation and groups must be positive.")
        if min(self.padding + self.output_padding) < 0:
            raise ConvolutionCaseError(f"{self.key}: padding must not be negative.")
        if channels != self.input_size[1]:
            raise ConvolutionCaseError(
                f"{self.key}: the weight takes {channels} input channels, the input has {self.input_size[1]}."
            )
        if self.weight_size[0] % self.groups:
            raise ConvolutionCaseError(
                f"{self.key}: {self.weight_size[0]} channels do not divide into {self.groups} groups."
            )
        if min(self.output_size) < 1:
            raise ConvolutionCaseError(
                f"{self.key}: its output would have the size {list(self.output_size)}."
            )


@dataclass(frozen=True)
class Operands:
    """Input, weight and output gradient of one convolution, all in one dtype and layout."""

    input: Tensor
    weight: Tensor
    grad_output: Tensor

    @property
    def num_bytes(self) -> int:
        """What the three take together."""
        return self.input.nbytes + self.weight.nbytes + self.grad_output.nbytes

    def copied(self) -> Operands:
        """The same values and strides, elsewhere in memory."""
        return Operands(self.input.clone(), self.weight.clone(), self.grad_output.clone())


def operands(case: Convolution, direction: Direction, dtype: torch.dtype, device: torch.device) -> Operands:
    """Random operands, contiguous, scaled so that the direction's result has about unit variance."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(size: tuple[int, ...], scale: float = 1.0) -> Tensor:
        values = torch.randn(size, generator=generator, device=device)
        return values.mul_(scale).to(dtype)

    scale = case.reduced(direction) ** -0.5
    return Operands(
        normal(case.input_size),
        normal(case.weight_size, 1.0 if direction == "weight_grad" else scale),
        normal(case.output_size, scale if direction == "weight_grad" else 1.0),
    )


def in_layout(values: Operands, layout: Layout) -> Operands:
    """The same values with the strides of `layout`."""
    return Operands(
        to_layout(values.input, layout),
        to_layout(values.weight, layout),
        to_layout(values.grad_output, layout),
    )


def to_layout(tensor: Tensor, layout: Layout) -> Tensor:
    """The tensor in `layout`: itself where it has it already, else a copy; below 4-D always itself."""
    if tensor.dim() not in (4, 5):
        return tensor
    return tensor.contiguous(memory_format=memory_format(layout, tensor.dim()))


def implementations(
    case: Convolution, direction: Direction, layout: Layout, values: Operands
) -> dict[str, Callable[[], Kernel]]:
    """Every implementation of a direction under a layout: what builds its kernel, by its name.

    Building may fail where a library does not support the case; so may the kernel.

    Args:
        case: the convolution.
        direction: which of the three results.
        layout: the layout that the operands have, and that the resulting activation is to have.
        values: its operands, already in `layout`.
    """
    found: dict[str, Callable[[], Kernel]] = {
        "aten.convolution": lambda: _convolution(case, direction, layout, values)
    }
    if case.is_matrix_product and layout == "channels_last":
        found["mm"] = lambda: _matrix_product(case, direction, values)
    if direction == "forward" and not case.transposed and values.input.device.type == "cpu":
        found["mkldnn.prepacked"] = lambda: _prepacked(case, layout, values)
    return found


def reference(case: Convolution, direction: Direction, values: Operands) -> Tensor:
    """The result in float64, from the operands as they were rounded."""
    exact = Operands(values.input.double(), values.weight.double(), values.grad_output.double())
    result = _convolution(case, direction, "contiguous", exact)()
    assert isinstance(result, Tensor)
    return result


def _convolution(case: Convolution, direction: Direction, layout: Layout, values: Operands) -> Kernel:
    # Bound outside of the timed callable: lists and look-ups would be timed with it.
    arguments = case.arguments
    if direction == "forward":
        forward = aten.convolution.default
        return lambda: to_layout(forward(values.input, values.weight, None, *arguments), layout)
    backward = aten.convolution_backward.default
    tensors = (values.grad_output, values.input, values.weight)
    if direction == "input_grad":
        only_input = [True, False, False]
        return lambda: to_layout(backward(*tensors, None, *arguments, only_input)[0], layout)
    sizes = ConvolutionSizes(case.input_size, case.weight_size, case.output_size, arguments)
    if layout == "channels_last" and overruns(sizes, values.input.dtype, values.input.device):
        raise NotImplementedError("oneDNN writes past the end of its memory")
    only_weight = [False, True, False]
    # A weight gradient keeps the strides its kernel gives it: what it must have is the optimizer's business.
    return lambda: backward(*tensors, None, *arguments, only_weight)[1]


def _matrix_product(case: Convolution, direction: Direction, values: Operands) -> Kernel:
    matrix = values.weight.reshape(case.output_channels, case.input_size[1])
    x, g = _rows(values.input), _rows(values.grad_output)
    left, right, size = {
        "forward": (x, matrix.t(), case.output_size),
        "input_grad": (g, matrix, case.input_size),
        "weight_grad": (g.t(), x, case.weight_size),
    }[direction]
    buffer = left.new_empty(left.shape[0], right.shape[1])
    if direction == "weight_grad":
        result = buffer.view(size)
    else:
        result = buffer.view(size[0], *size[2:], size[1]).movedim(-1, 1)

    def run() -> Tensor:
        torch.mm(left, right, out=buffer)
        return result

    return run


def _rows(tensor: Tensor) -> Tensor:
    """[N, C, *spatial] in channels_last as [N·spatial, C], without a copy."""
    return tensor.movedim(1, -1).view(-1, tensor.shape[1])


def _prepacked(case: Convolution, layout: Layout, values: Operands) -> Kernel:
    mkldnn = torch.ops.mkldnn
    stride, padding, dilation, _, _, groups = case.arguments
    weight = mkldnn._reorder_convolution_weight(
        values.weight, padding, stride, dilation, groups, list(case.input_size)
    )
    no_bias, no_scalars = None, list[float]()
    arguments = (no_bias, padding, stride, dilation, groups, "none", no_scalars, "")
    run = mkldnn._convolution_pointwise.default
    return lambda: to_layout(run(values.input, weight, *arguments), layout)


def _expanded(name: str, values: Sequence[int], spatial: int) -> tuple[int, ...]:
    if len(values) not in (1, spatial):
        raise ConvolutionCaseError(f"{name} {list(values)} must have 1 or {spatial} values.")
    return tuple(values) * (spatial if len(values) == 1 else 1)
