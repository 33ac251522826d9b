"""Forced: the operators that read and give the strides of the traced graph, by the reason why they must.

A reason is that of a whole family, whose members are given as names and as regular expressions of names. An
operator belongs to the first family that has it.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Operators that force for one reason.

    Attributes:
        reason: why they do.
        names: base names, or regular expressions of them, with spaces in between.
    """

    reason: str
    names: str

    @functools.cached_property
    def pattern(self) -> re.Pattern[str]:
        """What matches the whole name of each member."""
        return re.compile("|".join(self.names.split()))


FAMILIES = (
    Family(
        "draws random numbers in the order of the memory",
        r"""\w*bernoulli binomial _?cauchy \w*dropout exponential geometric gumbel_softmax log_normal
        multinomial normal normal_functional poisson rand\w* _?rrelu\w* uniform
        _no_grad_(normal|uniform) _philox_\w+ _sobol_\w+ _standard_gamma(_grad)? _sample_dirichlet
        _dirichlet_grad native_dropout_backward _fill_mem_eff_dropout_mask _masked_scale
        inductor_(rand\w*|seeds?|lookup_seed)""",
    ),
    Family(
        "reads, sets or promises strides, an offset or storage",
        r"""as_strided\w* inductor_force_stride_order force_strides copy copy_strided copy_ _copy_from\w*
        empty_strided empty_permuted new_empty_strided resize\w* _resize_output set set_data _set_item
        data stride storage_offset sym_stride sym_storage_offset sym_is_contiguous is_contiguous\w*
        is_strides_like_format is_non_overlapping_and_dense is_set_to _reshape_alias record_stream
        _has_\w+ _debug_has_internal_overlap _assert_tensor_metadata _lazy_clone shallow_copy_data""",
    ),
    Family(
        "a view of diagonals or of overlapping windows, which is dense in neither layout",
        r"diagonal\w* diag\w* fill_diagonal unfold unfold_backward unfold_copy rot90 linalg_diagonal",
    ),
    Family(
        "computes on complex numbers, whose kernels order dimensions by their strides",
        r"""_?fft_\w+ i?stft view_as_(complex|real) real imag complex polar angle chalf
        _?conj(_physical|_copy)? _neg_view resolve_(conj|neg) is_conj is_neg view_as_\w+_copy""",
    ),
    Family(
        "attention, whose kernels choose the strides of the result by those of the operands",
        r"""\w*scaled_dot_product\w* _(flash|efficient|cudnn)_attention\w* _triton_\w*attention
        _?(native_)?multi_head_attention\w* _fused_sdp_choice _transform\w+ _masked_softmax\w*""",
    ),
    Family(
        "the strides of the result are those of a product of matrices that is planned by the operands'",
        r"einsum tensordot _trilinear bilinear matmul matmul_backward linear_backward linalg_matmul",
    ),
    Family(
        "reads matrices or vectors of what is no image",
        r"""linalg_\w+ _linalg_\w+ cholesky\w* _cholesky_solve_helper qr svd lu_\w+ _lu_with_info det
        logdet slogdet inverse pinverse matrix_\w+ geqrf orgqr ormqr triangular_solve ger inner outer
        dot vdot mv addmv addr addbmm chain_matmul kron trace trace_backward nuclear_norm cross cov
        corrcoef vander _compute_linear_combination mvlgamma special_multigammaln cdist _cdist_\w+
        pdist _pdist_\w+ _euclidean_dist dist dist_backward block_diag cartesian_prod combinations
        tril_indices triu_indices _addmm_activation _grouped_mm grouped_mm _?scaled_\w+ _scaled_\w+
        _int_mm quack_symmetric_mm native_norm mT mH matrix_H numpy_T adjoint""",
    ),
    Family(
        "how much it gives depends on the values, or it reads a tensor as one row",
        r"""nonzero\w* argwhere masked_select\w* unique\w* _unique2? bincount histc histogram\w*
        _histogramdd\w* take put _index_put_impl index_select_backward equal allclose isin item
        _local_scalar_dense is_nonzero contains quantile nanquantile flatten_dense_tensors
        unflatten_dense_tensors hash_tensor gather_backward _gather_sparse_backward _unsafe_index_put
        _unsafe_masked_index\w*""",
    ),
    Family(
        "rarely met, and written as operators that have a row before inductor's graph",
        r"""_chunk_cat _stack column_stack row_stack atleast_\w+ broadcast_tensors meshgrid [hvd]split
        cumulative_trapezoid trapezoid trapz gradient sum_to_size _grad_sum_to_size dsplit _add_relu
        cumprod_backward cummaxmin_backward masked_scatter_backward value_selecting_reduction_backward
        glu_jvp glu_backward_jvp affine_grid\w* special_logsumexp narrow_copy slice_inverse
        to_padded_tensor broadcast_in_dim collapse collapse_view split_dim view_of_dtype copy_to""",
    ),
    Family(
        "a norm whose kernel also gives what its backward reads",
        r"""_fused_rms_norm(_backward)? native_layer_norm_backward batch_norm_\w+ _batch_norm_\w+
        _weight_norm\w* norm_except_dim""",
    ),
    Family(
        "reads and gives fewer than four dimensions",
        r"""conv1d conv_transpose1d conv_tbc\w* (_?adaptive_)?(avg|max)_pool1d\w*
        _?adaptive_(avg|max)_pool1d\w* lp_pool1d max_unpool1d upsample_linear1d\w*
        _?upsample_nearest(_exact)?1d\w* reflection_pad1d\w* replication_pad1d\w* dropout1d arange
        linspace logspace range eye scalar_tensor tensor as_tensor _list_to_tensor _tensor_to_list
        _shape_as_tensor \w+_window fft\w*freq one_hot _dim_arange iota""",
    ),
    Family(
        "a loss of vectors, sequences or classes",
        r"""\w*ctc_loss\w* multi_margin_loss\w* multilabel_\w+ cosine_embedding_loss hinge_embedding_loss
        margin_ranking_loss triplet_margin_\w+ nll_loss\w* \w*linear_cross_entropy\w*""",
    ),
    Family("looks rows up in a table of vectors", r"\w*embedding\w* segment_reduce _segment_reduce_backward"),
    Family(
        "recurrent, over sequences",
        r"""(quantized_)?(gru|lstm|rnn_\w+)(_cell)? _thnn_\w+ _?\w*(cudnn|miopen|mkldnn)_rnn\w*
        _?lstm_mps\w* _pack_\w+ _pad_packed_sequence pad_sequence _pad_enum
        _transformer_encoder_layer_fwd""",
    ),
    Family(
        "sparse or nested, which has no strides",
        r"""\w*sparse\w* \w*coalesced? \w*nested\w* \w*jagged\w* \w*(crow|ccol|col|row)_indices\w*
        _?indices\w* _?values\w* _nnz (dense|sparse)_dim _dim[IV] _?to_dense\w* hspmm smm sspaddmm
        _cslt_\w+ _spsolve _spdiags _convert_indices_\w+ _validate_\w+ to_mkldnn\w*""",
    ),
    Family(
        "quantised, or packs weights for one kernel",
        r"""\w*quant\w* _?dequantize q_\w+ qscheme int_repr \w*qparams\w* \w*moving_avg_obs\w* fbgemm_\w+
        _weight_int\w+ \w*weight_to_int4pack\w* _dyn_quant\w* _mixed_dtypes_linear _wrapped_\w+
        _saturate_weight_to_fp16 _rowwise_prune""",
    ),
    Family(
        "a kernel of one library or device, which no graph has before it is compiled",
        r"""_?(cudnn|miopen|mkldnn|mps|thnn|slow|nnpack|xla)_\w+ _?conv_depthwise\w* _convolution_mode
        _convolution_double_backward convolution(_backward)?_overrideable max_pool2d_backward
        _slow_conv\w+ _grid_sampler_2d_cpu_fallback\w* _propagate_xla_data _use_\w+ _foobar _mm_plus_mm
        _alloc_from_pool _reinterpret_tensor accumulate_grad prepare_softmax_online xor_sum
        inductor_cvt_\w+""",
    ),
    Family("works on lists of parameters", r"_foreach_\w+ _fused_(adam\w*|adagrad|sgd) _amp_\w+"),
    Family(
        "a copy that stands for a view after functionalisation",
        r"\w+_copy",
    ),
    Family(
        "names dimensions",
        r"align_\w+ refine_names rename",
    ),
    Family(
        "bookkeeping of autograd, functorch, scripts or devices",
        r"""_?backward _add_batch_dim _remove_batch_dim _(fw_primal|make_dual|unpack_dual) _functional_\w+
        _test_\w+ _assert_\w+ _autocast_\w+ _cast_\w+ _(is_)?\w*zerotensor _is_(all|any)_true
        _make_dep_token _to_cpu _new_zeros_with_same_feature_meta _no_grad_\w+ _ncf_\w+ _version
        _?pin_memory is_pinned is_leaf is_distributed is_inference result_type requires_grad
        retains?_grad grad output_nr get_gradients from_file cudnn_is_acceptable __interpolate
        __upsample\w* [A-Z]\w+ clear count dict get getitem items keys pop popitem remove setdefault
        sorted update _reshape_from_tensor _make_token _sink_tokens""",
    ),
)
"""Why operators force."""


@functools.lru_cache(maxsize=4096)
def reason_of(name: str) -> str | None:
    """Why the operator of a base name forces; None where no family has it."""
    return next((family.reason for family in FAMILIES if family.pattern.fullmatch(name)), None)
