"""Every implementation of a convolution computes it in its layout; sizes that are none are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from layout_settings import CASES, CPU, functional
from torch import Tensor

from fxpasses.devices.convolutions import (
    DIRECTIONS,
    Convolution,
    ConvolutionCaseError,
    Direction,
    Operands,
    implementations,
    in_layout,
    operands,
    reference,
)
from fxpasses.devices.profile import LAYOUTS
from fxpasses.graph.layouts import memory_format


@pytest.fixture
def exact() -> Callable[[Convolution, Direction, Operands], Tensor]:
    """The three results by autograd, in float64."""

    def run(case: Convolution, direction: Direction, values: Operands) -> Tensor:
        x = values.input.double().requires_grad_()
        w = values.weight.double().requires_grad_()
        y = functional(case, x, w)
        if direction == "forward":
            return y.detach()
        wanted = x if direction == "input_grad" else w
        return torch.autograd.grad(y, wanted, values.grad_output.double())[0]

    return run


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_implementation_computes_the_convolution_in_its_layout(
    case: Convolution, direction: Direction, exact: Callable[[Convolution, Direction, Operands], Tensor]
) -> None:
    values = operands(case, direction, torch.float32, CPU)
    expected = exact(case, direction, values)
    torch.testing.assert_close(reference(case, direction, values), expected, rtol=1e-9, atol=1e-9)
    names = set()
    for layout in LAYOUTS:
        laid_out = in_layout(values, layout)
        for name, build in implementations(case, direction, layout, laid_out).items():
            result = build()()
            assert isinstance(result, Tensor)
            torch.testing.assert_close(result.double(), expected, rtol=1e-3, atol=1e-3, check_stride=False)
            if direction != "weight_grad":
                assert result.is_contiguous(memory_format=memory_format(layout, result.dim())), name
            names.add(name)
    assert ("mm" in names) == case.is_matrix_product


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_output_size_and_flops_are_those_of_the_convolution(case: Convolution) -> None:
    x, w = torch.ones(case.input_size), torch.ones(case.weight_size)
    y = functional(case, x, w)
    assert tuple(y.shape) == case.output_size
    # Unpadded, a convolution of ones counts its products; cropping or padding leaves some out.
    if set(case.padding) == {0}:
        assert case.flops == 2 * int(y.sum())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((1, 3, 8), (4, 3, 3)), "4 dimensions"),
        (((1, 3, 8, 8), (4, 3, 3)), "4 dimensions"),
        (((1, 3, 8, 8), (4, 2, 3, 3)), "takes 2 input channels, the input has 3"),
        (((1, 3, 8, 8), (4, 3, 9, 9)), "output would have the size"),
        (((1, 3, 8, 8), (4, 3, 3, 3), (1, 1, 1)), "stride"),
        (((1, 3, 8, 8), (4, 3, 3, 3), (0,)), "must be positive"),
        (((1, 3, 8, 8), (4, 3, 3, 3), (1,), (-1,)), "must not be negative"),
        (((1, 4, 8, 8), (3, 2, 3, 3), (1,), (0,), (1,), False, (0,), 2), "do not divide into 2 groups"),
    ],
)
def test_sizes_that_are_no_convolution_are_refused(
    arguments: tuple[tuple[int, ...], ...], message: str
) -> None:
    with pytest.raises(ConvolutionCaseError, match=message):
        Convolution.of(*arguments)  # type: ignore[arg-type]  # a table of all kinds of arguments
