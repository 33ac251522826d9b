"""What a kernel or operator computes, by its name: one table of patterns, the first that fits decides.

Names are those of today's libraries. A compiler names a fused kernel after everything that went into it, so
`triton_poi_fused_convolution_relu_0` and `cpp_fused_convolution_0` hold what surrounds a convolution, not
the convolution: such names come first. Patterns are searched for anywhere in the name, and letters count
as written unless the pattern says otherwise. A fused attention is neither: it is more than its products.
"""

from __future__ import annotations

import functools
import re
from typing import Literal, NamedTuple

Kind = Literal["matmul", "convolution", "other"]


class Pattern(NamedTuple):
    """What a name that the expression is found in computes, and whose name it is."""

    kind: Kind
    library: str
    expression: str


PATTERNS: tuple[Pattern, ...] = (
    # What only sounds like one.
    Pattern("other", "Triton, by inductor", r"^triton_(poi|red|per|spl|for|unk)_"),
    Pattern("other", "C++, by inductor", r"cpp_fused_(?!.*template)"),
    Pattern("other", "cuDNN layout conversion", r"(?i)nchwToNhwc|nhwcToNchw|nhwcAddPadding|nchwAddPadding"),
    Pattern("other", "cuDNN layers", r"(?i)cudnn.*(bn_|batch_?norm|pooling|softmax|lrn|dropout)"),
    # Operators on a CPU, and composite ones anywhere.
    Pattern("convolution", "ATen", r"^aten::_?(convolution|conv\dd|conv_transpose\dd|conv_depthwise\dd)"),
    Pattern("convolution", "ATen", r"^aten::_?(slow_conv|thnn_conv|nnpack_spatial_convolution)"),
    Pattern("convolution", "ATen", r"^aten::_?(mkldnn|cudnn|miopen|mps|xnnpack)_\w*conv"),
    Pattern("convolution", "oneDNN, by inductor", r"^(mkldnn|onednn)::_?q?conv"),
    Pattern("matmul", "ATen", r"^aten::_?(mm|bmm|addmm|baddbmm|addbmm|mv|addmv|dot|vdot|matmul|linear)(_|$)"),
    Pattern(
        "matmul", "ATen", r"^aten::_?(addmm_activation|scaled_mm|int_mm|weight_int\dpack_mm|mkldnn_linear)"
    ),
    Pattern("matmul", "oneDNN and MKL, by inductor", r"^(mkldnn|mkl|onednn)::_?(mkl_|q)?linear"),
    Pattern("other", "ATen", r"^(aten|prims|prim)::"),
    # Convolutions come before matrix products: their kernels are named after the product they are made of.
    Pattern("convolution", "Triton template, by inductor", r"^triton_tem_.*conv"),
    Pattern("convolution", "cuDNN", r"(?i)cudnn.*(conv|winograd|[wd]grad|fprop|engine|fft)"),
    Pattern("convolution", "cuDNN", r"implicit_(convolve|gemm|precomp)|explicit_convolve|winograd"),
    Pattern("convolution", "cuDNN and CUTLASS", r"fprop|[wd]grad(?!ient)|implicit_?gemm|scudnn|conv\dd?_"),
    Pattern("convolution", "ATen CUDA", r"conv_depthwise|im2col|col2im|vol2col|col2vol|slow_conv"),
    Pattern("convolution", "MIOpen", r"(?i)miopen\w*conv|igemm_(fwd|bwd|wrw)|naive_conv|Im2d?2?Col"),
    Pattern("convolution", "oneDNN on GPUs", r"(?i)^(gen_|ref_|jit_)?conv(olution)?_(fwd|bwd)"),
    Pattern("matmul", "Triton template, by inductor", r"^triton_(tem_.*mm|b?mm)"),
    Pattern("matmul", "cuBLAS", r"(?i)gemm|gemv|cublas|splitKreduce|\bdot_kernel"),
    Pattern("matmul", "cuBLAS on Hopper and later", r"^nvjet_"),
    Pattern("matmul", "CUTLASS", r"(?i)cutlass.*(mma|matmul)|device_kernel.*matmul"),
    Pattern("matmul", "rocBLAS", r"^Cijk_"),
)

# Events of the category of operators that are frames around other ones: dispatch is not work of a device.
FRAMES: tuple[str, ...] = (
    r"^autograd::engine::",
    r"^torch::autograd::",
    r"Backward\d*$",
    r"^Torch-Compiled Region",
    r"^CompiledFunction",
    r"^## Call CompiledFxGraph",
    r"^TorchDynamo ",
    r"^Pregraph bytecode",
    r"^AOTDispatcher ",
    r"^ProfilerStep#",
    r"^PyTorch Profiler",
    r"^Optimizer\.",
)

_COMPILED = tuple((pattern.kind, re.compile(pattern.expression)) for pattern in PATTERNS)
_FRAMES = re.compile("|".join(FRAMES))


@functools.lru_cache(maxsize=65536)
def classify(name: str) -> Kind:
    """What the kernel or operator of this name computes."""
    return next((kind for kind, expression in _COMPILED if expression.search(name)), "other")


@functools.lru_cache(maxsize=65536)
def is_frame(name: str) -> bool:
    """Whether an operator event is only a frame around others."""
    return _FRAMES.search(name) is not None
