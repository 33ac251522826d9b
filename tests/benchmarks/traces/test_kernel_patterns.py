"""A kernel or an operator is known by its name: what it computes, and whether it is a mere frame."""

from __future__ import annotations

import pytest
from made_traces import CONV, GEMM

from benchmarks.traces.kernel_patterns import classify, is_frame


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (GEMM, "matmul"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT", "matmul"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_s1688gemm_128x128_16x4_nn_align4>(...)", "matmul"),
        ("void splitKreduce_kernel<32, 16, int, float>(...)", "matmul"),
        ("Cijk_Ailk_Bljk_SB_MT64x64x16_MI32x32", "matmul"),
        ("triton_tem_fused_addmm_relu_1", "matmul"),
        ("aten::addmm", "matmul"),
        ("mkldnn::_linear_pointwise", "matmul"),
        ("mkl::_mkl_linear", "matmul"),
        (CONV, "convolution"),
        ("cudnn_infer_ampere_scudnn_128x64_relu_medium_nn_v1", "convolution"),
        ("void cudnn::winograd_nonfused::winogradForwardData4x4<float>(...)", "convolution"),
        (
            "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_f16_s16816fprop_optimized_f16>(...)",
            "convolution",
        ),
        ("void at::native::conv_depthwise2d_forward_kernel<3, float, int>(...)", "convolution"),
        ("triton_tem_fused_convolution_3", "convolution"),
        ("aten::mkldnn_convolution", "convolution"),
        ("aten::convolution_backward", "convolution"),
        ("mkldnn::_convolution_pointwise", "convolution"),
        ("void cudnn::ops::nchwToNhwcKernel<float>(...)", "other"),
        ("void cudnn::bn_fw_tr_1C11_kernel_NCHW<float>(...)", "other"),
        ("triton_poi_fused_convolution_relu_0", "other"),
        ("triton_red_fused_mm_sum_4", "other"),
        ("graph_0_cpp_fused_convolution_backward_0", "other"),
        ("void at::native::vectorized_elementwise_kernel<4>(...)", "other"),
        ("aten::mul", "other"),
        ("aten::mean", "other"),
        ("aten::max_pool2d", "other"),
    ],
)
def test_a_name_is_classified_by_what_it_computes(name: str, kind: str) -> None:
    assert classify(name) == kind


@pytest.mark.parametrize(
    ("name", "frame"),
    [
        ("autograd::engine::evaluate_function: MmBackward0", True),
        ("MmBackward0", True),
        ("torch::autograd::AccumulateGrad", True),
        ("Torch-Compiled Region: 0/0", True),
        ("## Call CompiledFxGraph fpibj3hp ##", True),
        ("TorchDynamo Cache Lookup", True),
        ("aten::convolution_backward", False),
        ("aten::mm", False),
        ("graph_0_cpp_fused_relu_0", False),
        ("mkldnn::_convolution_pointwise", False),
    ],
)
def test_frames_are_told_from_operators(name: str, frame: bool) -> None:
    assert is_frame(name) is frame
