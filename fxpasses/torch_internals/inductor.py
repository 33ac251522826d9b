"""Inductor: compiling by it, its settings, the places where it takes passes, and its own decisions.

It is imported inside the functions: loading this module does not load it.
Known for torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch._ops import OpOverload

from fxpasses.errors import MissingCompilerError, UnknownOptionError, unknown_name

REALIZE_TO_STRIDES = "inductor_realize_to_strides"
"""The key in a node's metadata that has inductor put its result into memory with the strides of its value."""


def inductor_mode_options(mode: str) -> dict[str, Any]:
    """The inductor configuration that `torch.compile(mode=...)` stands for."""
    from torch._inductor import list_mode_options

    modes = list_mode_options()
    if mode not in modes:
        raise UnknownOptionError(unknown_name("mode", mode, modes))
    return dict(list_mode_options(mode))


def is_inductor_option(name: str) -> bool:
    """Whether inductor's configuration has an entry of that name."""
    from torch._inductor import config

    return name in config.get_config_copy()


def inductor_folds_batch_norms(patches: Mapping[str, Any]) -> bool:
    """Whether inductor's own conv-BN pass would run, under its settings now and these."""
    from torch._inductor import config

    wanted, freezing = (
        patches.get(name, getattr(config, name)) for name in ("efficient_conv_bn_eval_fx_passes", "freezing")
    )
    return bool(wanted and not freezing)


def compile_with_inductor(
    gm: torch.fx.GraphModule, inputs: Sequence[Any], patches: Mapping[str, Any]
) -> Callable[..., Any]:
    """Hands a graph to inductor under configuration patches. Inductor takes the graph over and mutates it.

    Raises:
        MissingCompilerError: inductor found no C++ compiler.
    """
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx

    settings = {**_vector_width(inputs), **patches}
    if settings.get("cpp_wrapper", config.cpp_wrapper):
        # It takes a graph whose inputs have these values for an exported one, whose sizes are no inputs.
        for node in gm.graph.find_nodes(op="placeholder"):
            node.meta.pop("val", None)
    with _missing_compiler_explained():
        return cast(Callable[..., Any], compile_fx(gm, list(inputs), config_patches=settings))


def _vector_width(inputs: Sequence[Any]) -> dict[str, int]:
    """The setting under which inductor compiles for the vectors that it would take anyway.

    Without it the keys of inductor's caches do not tell for which vectors a graph was compiled: code for
    AVX-512 is run again with `ATEN_CPU_CAPABILITY=avx2`, in vectors half as long, and gives wrong results.
    """
    from torch._inductor import config
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    on_cpu = any(isinstance(value, torch.Tensor) and value.device.type == "cpu" for value in inputs)
    if not on_cpu or config.cpp.simdlen is not None:
        return {}
    try:
        return {"cpp.simdlen": pick_vec_isa().bit_width()}
    except Exception:  # no compiler: inductor says so where it needs one
        return {}


@contextlib.contextmanager
def _missing_compiler_explained() -> Iterator[None]:
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        yield
    except Exception as error:
        if _caused_by(error, InvalidCxxCompiler) or (
            _caused_by(error, FileNotFoundError) and not has_cxx_compiler()
        ):
            raise MissingCompilerError(MISSING_COMPILER) from error
        raise


MISSING_COMPILER = (
    "inductor compiles C++ for the CPU and found no compiler. Install one (Debian and Ubuntu: "
    "`apt-get install g++`; Fedora: `dnf install gcc-c++`; conda: `conda install gxx`; macOS: "
    "`xcode-select --install`) or name it in the environment variable CXX. Without a compiler, "
    "options={'inner': 'aot_eager'} runs the rewritten graph."
)


def failed_on_symbols(error: BaseException) -> bool:
    """Whether inductor could not compare sizes or strides that are symbols.

    It asks for the remainder of one stride by another; where sympy leaves a quotient in that, the analysis of
    its range fails: "Invalid ranges". So does 2.13; 2.15 compiles the cases that are known.
    """
    from torch.utils._sympy.value_ranges import ValueRangeError

    return _caused_by(error, ValueRangeError)


def has_cxx_compiler() -> bool:
    """Whether a C++ compiler that inductor would try is on the path."""
    from torch._inductor import config

    candidates = config.cpp.cxx if isinstance(config.cpp.cxx, (list, tuple)) else (config.cpp.cxx,)
    return any(compiler and shutil.which(compiler) for compiler in candidates)


def _caused_by(error: BaseException | None, kind: type[BaseException]) -> bool:
    while error is not None:
        if isinstance(error, kind):
            return True
        error = error.__cause__ or error.__context__
    return False


def is_pattern_matcher_pass(given: object) -> bool:
    """Whether it is inductor's `PatternMatcherPass`."""
    from torch._inductor.pattern_matcher import PatternMatcherPass

    return isinstance(given, PatternMatcherPass)


JOINT_SLOT = "joint_custom_post_pass"
"""Inductor's setting for a pass over the joint graph of forward and backward (in inference the only one)."""


def with_joint_pass(
    given: Mapping[str, Any], run: Callable[[torch.fx.Graph], None], key: Callable[[], object]
) -> dict[str, Any]:
    """Inductor's settings with one more pass in `JOINT_SLOT`, after those that the slot held.

    Args:
        given: the settings so far.
        run: the pass.
        key: what its result depends on besides the graph; part of inductor's cache keys. None keeps the
            caches away.
    """
    from torch._inductor.custom_graph_pass import CustomGraphPass

    others = inductor_setting(JOINT_SLOT, given)  # None, a pass, or a sequence of passes
    held = tuple(others) if isinstance(others, (list, tuple)) else (() if others is None else (others,))

    class JointGraphPass(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            for graph_pass in held:
                graph_pass(graph)
            run(graph)

        def uuid(self) -> object | None:
            # A pass without a key of its own keeps the caches away, here as in stock inductor.
            keys = [
                key(),
                *(
                    graph_pass.uuid() if isinstance(graph_pass, CustomGraphPass) else None
                    for graph_pass in held
                ),
            ]
            return None if None in keys else tuple(keys)

    return {**given, JOINT_SLOT: JointGraphPass()}


def joint_key(patches: Mapping[str, Any]) -> str:
    """What the passes in `JOINT_SLOT` depend on under these settings, a layout plan among them."""
    held = patches.get(JOINT_SLOT)
    return str(held.uuid()) if held is not None else ""


def with_partition_seen(
    given: Mapping[str, Any],
    see: Callable[[torch.fx.GraphModule, torch.fx.GraphModule, int], None],
    key: object,
) -> dict[str, Any]:
    """Inductor's settings under which `see` is shown the two parts that a joint graph is split into.

    Args:
        given: the settings so far; a partitioner of the user's stays in use.
        see: is given the forward, the backward and the number of the forward's results. It changes nothing.
        key: part of inductor's cache keys.
    """
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.custom_graph_pass import CustomPartitionerFn

    held = inductor_setting("custom_partitioner_fn", given)

    class SeenPartition(CustomPartitionerFn):
        def __call__(self, gm: torch.fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any) -> Any:
            forward, backward = (held or min_cut_rematerialization_partition)(gm, joint_inputs, **kwargs)
            see(forward, backward, kwargs["num_fwd_outputs"])
            return forward, backward

        def uuid(self) -> object | None:
            theirs = held.uuid() if held is not None else ""
            return None if theirs is None else (key, theirs)

        def __reduce__(self) -> tuple[Callable[..., str], tuple[str]]:
            # Inductor's cache keys pickle its settings whole; without a key nothing is found again.
            return str, (secrets.token_hex() if self.uuid() is None else repr(self.uuid()),)

    return {**given, "custom_partitioner_fn": SeenPartition()}


def decide_stock_layout(nodes: Sequence[torch.fx.Node], *, is_inference: bool) -> bool:
    """Whether inductor, with its layout optimisation on, would lay a graph's convolutions out channels-last.

    Args:
        nodes: of the forward; every convolution as `aten.convolution` over operands with metadata.
        is_inference: whether no backward follows.
    """
    from types import SimpleNamespace

    from torch._inductor import config
    from torch._inductor.graph import GraphLowering

    graph_module: Any = SimpleNamespace(graph=SimpleNamespace(nodes=nodes))
    with config.patch(layout_optimization=True):
        return bool(GraphLowering.decide_layout_opt(graph_module, is_inference=is_inference))


def inductor_setting(name: str, patches: Mapping[str, Any]) -> Any:
    """The value that a setting of inductor will have under configuration patches."""
    from torch._inductor import config

    return patches[name] if name in patches else getattr(config, name)


def inductor_cache_folder() -> str:
    """Where inductor keeps what it compiled."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return str(cache_dir())


def inductor_caches_are_on(patches: Mapping[str, Any]) -> bool:
    """Whether inductor may take a graph from its cache, so that passes inside it do not run."""
    return bool(inductor_setting("fx_graph_cache", patches)) and not inductor_setting(
        "force_disable_caches", patches
    )


@functools.cache
def force_stride_order() -> OpOverload:
    """The operator that has inductor put a tensor into memory in an order of strides, if it is not so."""
    from torch._inductor import inductor_prims

    return cast(OpOverload, inductor_prims.force_stride_order)


@functools.cache
def force_strides() -> OpOverload:
    """The operator of ours that has inductor put a tensor into memory with given strides, if it is not so.

    `force_stride_order` asks which of two strides is the larger, and inductor fails on some symbols there, as
    `failed_on_symbols` has it. This one asks alone which are equal.
    """
    from torch._inductor import ir, lowering

    torch.library.define("fxpasses::force_strides", "(Tensor input, SymInt[] stride) -> Tensor")
    torch.library.impl("fxpasses::force_strides", "CompositeExplicitAutograd", _with_strides)
    torch.library.register_fake("fxpasses::force_strides", _with_strides)
    operator: OpOverload = torch.ops.fxpasses.force_strides.default

    @lowering.register_lowering(operator, type_promotion_kind=None)
    def lower(given: Any, stride: Sequence[Any]) -> Any:
        return ir.ExternKernel.require_exact_strides(given, stride)

    return operator


def _with_strides(given: torch.Tensor, stride: Sequence[int]) -> torch.Tensor:
    return given.new_empty_strided(given.shape, stride).copy_(given)


@functools.cache
def image_order() -> OpOverload:
    """The operator of ours that has inductor put an image into channels-last memory, or plane by plane.

    Its arguments are no strides, which would be compared with symbols; a matrix is put row by row.
    """
    from torch._inductor import ir, lowering

    torch.library.define("fxpasses::image_order", "(Tensor input, bool planar) -> Tensor")
    torch.library.impl("fxpasses::image_order", "CompositeExplicitAutograd", in_image_order)
    torch.library.register_fake("fxpasses::image_order", in_image_order)
    operator: OpOverload = torch.ops.fxpasses.image_order.default

    @lowering.register_lowering(operator, type_promotion_kind=None)
    def lower(given: Any, planar: bool) -> Any:
        rank = len(given.get_size())
        if rank == 5 and not planar:
            # Inductor fails on some symbols where it asks for an order, as `failed_on_symbols` has it.
            strides = torch._prims_common.make_channels_last_strides_for(given.get_size())
            return ir.ExternKernel.require_exact_strides(given, strides)
        order = list(reversed(range(rank))) if planar or rank != 4 else ir.NHWC_STRIDE_ORDER
        return ir.ExternKernel.require_stride_order(given, order)

    return operator


def in_image_order(given: torch.Tensor, planar: bool) -> torch.Tensor:
    """What `image_order` gives."""
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    layout = torch.contiguous_format if planar else layouts.get(given.dim(), torch.contiguous_format)
    return torch.empty_like(given, memory_format=layout).copy_(given)


def writes_cpp_wrapper() -> bool:
    """Whether inductor, as it is set now, calls kernels from C++; that crashes with lists of tensors."""
    from torch._inductor import config

    return bool(config.cpp_wrapper)


def record_result_strides(graph: torch.fx.Graph, positions: Collection[int] | None = None) -> None:
    """Has results be given in the strides that the graph's metadata say now.

    Inductor gives them in those that it recorded: after our passes, but since 2.15 before them.

    Args:
        graph: inductor's, changed by a pass.
        positions: of the results among what the graph gives; None for those of the last call, which come as
            kernels write them.
    """
    meta = graph.output_node().meta
    given: Any = graph.output_node().args[0]
    if positions is not None:
        meta[_FREE_RESULTS] = tuple(positions)
    recorded = meta.get("original_output_strides")
    if recorded is None:
        return
    for at in meta.get(_FREE_RESULTS, ()):
        value = given[at].meta.get("val")
        recorded[at] = value.stride() if positions is not None and isinstance(value, torch.Tensor) else None


_FREE_RESULTS = "fxpasses_free_results"
"""What an output node notes the positions under."""


def tunes_products() -> bool:
    """Whether inductor, as it is set now, writes products itself, for which it packs constants at once."""
    from torch._inductor import config

    return bool(config.max_autotune or config.max_autotune_gemm)


def compile_ahead(program: torch.export.ExportedProgram, path: str | os.PathLike[str]) -> None:
    """Compiles a program with AOTInductor, and writes a package that `aoti_load_package` reads.

    Args:
        program: for inference.
        path: a file named .pt2.
    """
    from torch._inductor import aoti_compile_and_package

    aoti_compile_and_package(program, package_path=os.fspath(path))


@contextlib.contextmanager
def caches_tagged(tag: str) -> Iterator[None]:
    """A block in which caches of compiled code hold what was kept under this tag, and the user's own."""
    caches: Any = torch.compiler.config  # its `patch` is put there at run time
    with caches.patch(cache_key_tag=f"{caches.cache_key_tag}{tag}"):
        yield
