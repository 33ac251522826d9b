"""Which of our kernels computes a convolution or a linear layer of inductor's graph, if one does.

They take float32 on a CPU, of any batch, height and width. Which of them is taken, or torch's, is measured
(`fxpasses.kernels.choice`), at the hints where sizes are symbols.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch.fx import Graph, Node

from fxpasses.graph.decline import Decline
from fxpasses.graph.layouts import order_of
from fxpasses.graph.metadata import tensor
from fxpasses.kernels.choice import KernelTiming, choose, choose_linear
from fxpasses.kernels.convolution import Sizes, kernels_for
from fxpasses.kernels.kernel import Kernel
from fxpasses.kernels.library import identity
from fxpasses.passes.weights.epilogues import epilogue_of
from fxpasses.report import sidecar
from fxpasses.torch_internals.sizes import size_hint

OwnKernels = Literal["measured", "always", "never"]
"""When kernels of ours are taken: where they were measured to be faster, wherever there are any, or never."""


def may_be_ours(node: Node) -> bool:
    """Whether it is a direct 2-D convolution or a matrix product in float32."""
    found = tensor(node)
    if found is None or found.dtype != torch.float32:
        return False
    if node.target is torch.ops.aten.convolution.default:
        return found.ndim == 4 and not node.args[6]
    return node.target in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)


def sizes_of(convolution: Node) -> Sizes | None:
    """The sizes of a direct 2-D convolution in float32; None for any other."""
    arguments: tuple[Any, ...] = convolution.args
    image, weight, _, stride, padding, dilation, transposed, _, groups = arguments
    value, filters = tensor(image), tensor(weight)
    if transposed or value is None or filters is None or value.dim() != 4 or value.dtype != torch.float32:
        return None
    kernel, *space = map(_pair, (filters.shape[2:], stride, padding, dilation))
    channels = (
        filters.shape[1] * groups
    )  # which the image has too, though its metadata may say so by a symbol
    return Sizes(channels, filters.shape[0], groups, kernel, *space)


def _pair(given: Sequence[int]) -> tuple[int, int]:
    """Height and width, which are given as one number where they are equal."""
    return given[0], given[-1]


def own_kernel(
    own: OwnKernels, sizes: Sizes, pixels: int, measure: Callable[[], KernelTiming], *, planar: bool = False
) -> Kernel | Decline | None:
    """Which of our kernels to take, why torch's is better, or None where there is none of ours.

    Args:
        own: whether ours are wanted.
        sizes: of the convolution.
        pixels: how many its result has.
        measure: tells which is the fastest.
        planar: whether its image is in contiguous memory.
    """
    kernels = kernels_for(sizes, pixels, planar=planar) if own != "never" else ()
    if not kernels:
        return None
    if own == "always":
        return kernels[0]
    timing = measure()
    if timing.pays:
        return timing.kernel
    figures = tuple(round(1e6 * seconds, 1) for seconds in (timing.theirs, timing.seconds))
    return Decline("not-faster", "torch's kernel took {} µs and ours {} µs", None, figures)


def own_kernel_of_convolution(
    own: OwnKernels, convolution: Node, sizes: Sizes, *, planar: bool, far: bool
) -> Kernel | Decline | None:
    """The same for a convolution of those sizes, with a summand where one follows it."""
    value, result = tensor(convolution.args[0]), tensor(convolution)
    assert value is not None
    assert result is not None
    count, channels, height, width = map(size_hint, value.shape)
    summand = not sizes.is_depthwise and epilogue_of(convolution, summand=True).summand is not None
    return own_kernel(
        own,
        sizes,
        math.prod(map(size_hint, result.shape)) // sizes.filters,
        lambda: choose(sizes, (count, channels, height, width), summand=summand, planar=planar, far=far),
        planar=planar,
    )


def own_kernel_of_linear(own: OwnKernels, sizes: Sizes, rows_of: torch.Tensor) -> Kernel | Decline | None:
    """The same for a linear layer over a tensor's rows; None also where ours do not take that tensor."""
    elements = math.prod(map(size_hint, rows_of.shape))
    if rows_of.dtype != torch.float32 or rows_of.device.type != "cpu" or not elements:
        return None
    rows = elements // sizes.channels
    return own_kernel(own, sizes, rows, lambda: choose_linear(rows, sizes.channels, sizes.filters))


def before_convolutions(graph: Graph) -> set[Node]:
    """The nodes that depend on no convolution, which lie in memory as the graph's inputs do."""
    found: set[Node] = set()
    for node in graph.nodes:
        is_before = node.target is not torch.ops.aten.convolution.default
        if is_before and all(operand in found for operand in node.all_input_nodes):
            found.add(node)
    return found


def is_contiguous(node: Node) -> bool:
    """Whether it is, at the hints of its sizes."""
    found = tensor(node)
    return found is not None and order_of(found) in ("contiguous", "both")


def made_for_other_kernels(graph_key: str, patches: Mapping[str, Any]) -> Decline | None:
    """Why what inductor's caches hold of a graph is of no use: another CPU or version made it, if one did.

    Args:
        graph_key: what names the graph, which was just compiled with the kernels that there are.
        patches: inductor's settings.
    """
    name, ours = sidecar.digest("kernels", graph_key, str(sorted(patches))), identity()
    try:
        known = [str(kernels) for kernels in sidecar.load(name)]
    except (OSError, ValueError, TypeError):
        known = []
    sidecar.save(name, [*(kernels for kernels in known if kernels != ours), ours], patches)
    if not known or ours in known:
        return None
    message = "what the caches hold was made for other kernels or another CPU ({}): it is not used"
    return Decline("other-kernels", message, None, (known[-1],))
