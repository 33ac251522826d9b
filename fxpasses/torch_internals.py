"""The only file that imports private torch names.

Each function wraps one private facility and says what it is for, so that a torch release that moves a name
costs one edit here. Everything expensive (Dynamo, inductor) is imported inside the functions: importing
this module, and so `import fxpasses`, loads neither. Known to hold for torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import inf
from typing import TYPE_CHECKING, Any, cast

import torch
from torch._ops import HigherOrderOperator as HigherOrderOperator
from torch._ops import OpOverload as OpOverload
from torch._ops import OpOverloadPacket as OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode

from fxpasses.errors import MissingCompilerError, UnsupportedTorchError

if TYPE_CHECKING:
    import sympy

SUPPORTED_TORCH = ((2, 11), (2, 16))
"""The oldest supported (major, minor) version of torch, and the first one above the range."""


def require_supported_torch() -> None:
    """Raises `UnsupportedTorchError` unless the installed torch is in the supported range."""
    found = re.match(r"(\d+)\.(\d+)", torch.__version__)
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    oldest, beyond = SUPPORTED_TORCH
    if not oldest <= version < beyond:
        low, high = (".".join(map(str, each)) for each in SUPPORTED_TORCH)
        raise UnsupportedTorchError(
            f"fxpasses supports torch >={low},<{high} and found {torch.__version__}. "
            f"Install one of those, such as `pip install 'torch>={low},<{high}'`."
        )


def make_graph_module(root: torch.nn.Module, graph: torch.fx.Graph, class_name: str) -> torch.fx.GraphModule:
    """A graph module that writes its Python code when it is first called or printed, not before."""
    from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module

    with _use_lazy_graph_module(True):
        return _make_graph_module(root, graph, class_name=class_name)


# Operators ------------------------------------------------------------------------------------------------


def operator_name(op: OpOverload | HigherOrderOperator) -> str:
    """The qualified name of an operator, such as ``"aten::conv2d.padding"``."""
    return str(op.name())  # type: ignore[no-untyped-call]  # torch leaves it untyped


@functools.cache
def is_composite(op: OpOverload) -> bool:
    """Whether `op` decomposes by itself, so that it appears before dispatch only."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator_name(op), "CompositeImplicitAutograd")


def aten_packet(name: str) -> OpOverloadPacket | None:
    """The packet `torch.ops.aten.<name>`, or None when there is no such operator."""
    if not name.isidentifier():
        return None
    return cast("OpOverloadPacket | None", getattr(torch.ops.aten, name, None))


def packet_overloads(packet: OpOverloadPacket) -> list[OpOverload]:
    """Every overload of an operator packet."""
    return [getattr(packet, overload) for overload in packet.overloads()]  # type: ignore[no-untyped-call]  # torch leaves it untyped


LINEAR_FUNCTION: Callable[..., Any] = torch._C._nn.linear
"""What `torch.nn.functional.linear` is in a graph."""


def has_global_module_hooks() -> bool:
    """Whether hooks are registered that run at the call of every module."""
    found = torch.nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]  # torch leaves it
    return bool(found)


# Modes that a graph switches -------------------------------------------------------------------------------

SET_GRAD_ENABLED: Callable[..., Any] = torch._C._set_grad_enabled
ENTER_AUTOCAST: Callable[..., Any] = torch.amp.autocast_mode._enter_autocast
EXIT_AUTOCAST: Callable[..., Any] = torch.amp.autocast_mode._exit_autocast


# Fake tensors and functorch wrappers -----------------------------------------------------------------------


def is_functorch_wrapped(tensor: torch.Tensor) -> bool:
    """Whether a functorch transform (grad, jvp, vmap) wraps the tensor."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def is_batched(tensor: torch.Tensor) -> bool:
    """Whether vmap hides a batch dimension of the tensor, at any level."""
    while is_functorch_wrapped(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return False


def unwrap_functorch(tensor: torch.Tensor) -> torch.Tensor:
    """The plain tensor under every functorch wrapper."""
    while is_functorch_wrapped(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def storage_key(tensor: torch.Tensor) -> int | None:
    """An identity of the tensor's storage, equal for views of one another; None where there is none."""
    try:
        return int(unwrap_functorch(tensor).untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None


def size_hint(size: int | torch.SymInt, fallback: int = 64) -> int:
    """The size that a symbolic dimension had when it was traced, without adding a guard.

    Args:
        size: a static or symbolic size.
        fallback: what to assume of a size that no example backs.
    """
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return int(hint) if isinstance(hint, int) else fallback


def new_fake_mode() -> FakeTensorMode:
    """A fake tensor mode with static shapes that accepts real parameters beside fake inputs."""
    return FakeTensorMode(allow_non_fake_inputs=True)


# Graph inputs ----------------------------------------------------------------------------------------------


def is_module_tensor(placeholder: torch.fx.Node) -> bool:
    """Whether a graph input from Dynamo is a parameter or buffer of a module."""
    return bool(placeholder.meta.get("tensor_dict", {}).get("_dynamo_static_input_type"))


def mark_as_static_input(placeholder: torch.fx.Node) -> None:
    """Makes a graph input that we add look to AOTAutograd like one from Dynamo whose memory stays."""
    placeholder._dynamo_source = None  # where Dynamo keeps it
    placeholder.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}


def is_deterministic(node: torch.fx.Node) -> bool:
    """Whether a call is of an operator of torch that draws no random numbers."""
    target = node.target
    if isinstance(target, OpOverload):
        return torch.Tag.nondeterministic_seeded not in target.tags
    if getattr(target, "__module__", None) == "_operator":
        return True
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    packet = aten_packet(str(name))
    if packet is None:
        return False
    overloads = packet_overloads(packet)
    return (
        all(torch.Tag.nondeterministic_seeded not in each.tags for each in overloads)
        and "dropout" not in name
    )


def mark_for_recomputation(node: torch.fx.Node) -> None:
    """Tags a node as activation checkpointing would, for AOTAutograd's partitioner."""
    from torch.utils.checkpoint import CheckpointPolicy

    node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
    # Zero comes before the regions of the user's own checkpoints, which number from one.
    node.meta["ac_graph_id"] = 0


# Dynamo and inductor ---------------------------------------------------------------------------------------


REALIZE_TO_STRIDES = "inductor_realize_to_strides"
"""The key in a node's metadata that has inductor put its result into memory with the strides of its value."""


def dynamo_counters() -> Mapping[str, Any]:
    """`torch._dynamo.utils.counters`, the counters that inductor's users know."""
    from torch._dynamo.utils import counters

    return cast(Mapping[str, Any], counters)


def lookup_backend(name: str) -> Callable[..., Any]:
    """The Dynamo backend registered under `name`.

    Raises:
        ValueError: there is none; the message lists those that exist and the closest.
    """
    from torch._dynamo.backends.registry import list_backends, lookup_backend

    from fxpasses.errors import UnknownOptionError, unknown_name

    names = list_backends(exclude_tags=())
    if name not in names:
        raise UnknownOptionError(unknown_name("inner backend", name, names))
    return cast(Callable[..., Any], lookup_backend(name))


def inductor_mode_options(mode: str) -> dict[str, Any]:
    """The inductor configuration that `torch.compile(mode=...)` stands for."""
    from torch._inductor import list_mode_options

    from fxpasses.errors import UnknownOptionError, unknown_name

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
    from torch._inductor.compile_fx import compile_fx

    settings = {**_vector_width(inputs), **patches}
    with _missing_compiler_explained():
        return cast(Callable[..., Any], compile_fx(gm, list(inputs), config_patches=settings))


def _vector_width(inputs: Sequence[Any]) -> dict[str, int]:
    """The setting under which inductor compiles for the vectors that it would take anyway.

    Without it the keys of inductor's caches do not tell for which vectors a graph was compiled: code for
    AVX-512 is run again with `ATEN_CPU_CAPABILITY=avx2`, in vectors half as long, and gives wrong results.
    """
    from torch._inductor import config
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    on_cpu = any(isinstance(each, torch.Tensor) and each.device.type == "cpu" for each in inputs)
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


def has_cxx_compiler() -> bool:
    """Whether a C++ compiler that inductor would try is on the path."""
    from torch._inductor import config

    candidates = config.cpp.cxx if isinstance(config.cpp.cxx, (list, tuple)) else (config.cpp.cxx,)
    return any(each and shutil.which(each) for each in candidates)


def _caused_by(error: BaseException | None, kind: type[BaseException]) -> bool:
    while error is not None:
        if isinstance(error, kind):
            return True
        error = error.__cause__ or error.__context__
    return False


def reset_dynamo() -> None:
    """Drops everything Dynamo has compiled in this process."""
    import torch._dynamo

    torch._dynamo.reset()


# Verification ----------------------------------------------------------------------------------------------


def scalar_hint(symbol: torch.SymInt | torch.SymFloat | torch.SymBool) -> int | float | bool:
    """The value that a symbolic number had when it was traced, without adding a guard.

    Raises:
        ValueError: no example backs the symbol.
    """
    hint = symbol.node.hint
    if hint is None:
        raise ValueError(f"{symbol} has no example value")
    return cast("int | float | bool", hint)


def guard_count(mode: FakeTensorMode) -> int:
    """How many guards and run-time assertions the sizes of a fake mode have gathered."""
    environment = mode.shape_env
    if environment is None:
        return 0
    deferred = sum(map(len, environment.deferred_runtime_asserts.values()))
    return len(environment.guards) + deferred


def trace_artifact(name: str, make: Callable[[], str]) -> None:
    """Adds a text to torch's structured trace (`TORCH_TRACE`, read by tlparse); free when that is off."""
    from torch._logging._internal import trace_structured

    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "json"},
        payload_fn=make,
        expect_trace_id=False,
    )


# Tracing of rules ------------------------------------------------------------------------------------------


def core_decompositions() -> dict[OpOverload, Callable[..., Any]]:
    """What turns a graph into core ATen."""
    from torch._decomp import core_aten_decompositions

    table = cast(Mapping[OpOverload, Callable[..., Any]], core_aten_decompositions())
    return dict(table.items())


def same_expression(
    first: int | torch.SymInt | torch.SymFloat, second: int | torch.SymInt | torch.SymFloat
) -> bool:
    """Whether two symbolic numbers are the same expression, without adding a guard."""
    expressions = [each if isinstance(each, int) else each.node.expr for each in (first, second)]
    return bool(expressions[0] == expressions[1])


# Inductor's pattern matcher --------------------------------------------------------------------------------


def is_pattern_matcher_pass(given: object) -> bool:
    """Whether it is inductor's `PatternMatcherPass`."""
    from torch._inductor.pattern_matcher import PatternMatcherPass

    return isinstance(given, PatternMatcherPass)


def is_erased(node: torch.fx.Node) -> bool:
    """Whether a node has been taken out of its graph."""
    return bool(node._erased)


# Symbolic sizes --------------------------------------------------------------------------------------------


def size_expression(size: int | torch.SymInt) -> int | sympy.Expr:
    """The size as an expression of the graph's size symbols, without adding a guard."""
    return size if isinstance(size, int) else cast("sympy.Expr", size.node.expr)


def symbol_values(size: torch.SymInt) -> dict[sympy.Symbol, tuple[int, float, float]]:
    """Of every size symbol in `size`'s shape environment: its value when traced, and its range."""
    environment = size.node.shape_env
    values = environment.backed_var_to_val
    return {
        symbol: (int(value), _bound(ranges.lower, 0.0), _bound(ranges.upper, inf))
        for symbol, value in values.items()
        if (ranges := environment.var_to_range.get(symbol)) is not None and value.is_Integer
    }


def _bound(given: sympy.Expr, unbounded: float) -> float:
    return float(given) if given.is_Integer else unbounded


# Passes inside inductor ------------------------------------------------------------------------------------

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
            for each in held:
                each(graph)
            run(graph)

        def uuid(self) -> object | None:
            # A pass without a key of its own keeps the caches away, here as in stock inductor.
            keys = [key(), *(each.uuid() if isinstance(each, CustomGraphPass) else None for each in held)]
            return None if None in keys else tuple(keys)

    return {**given, JOINT_SLOT: JointGraphPass()}


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


def trace_symbolically(model: torch.nn.Module, inputs: Sequence[Any]) -> torch.fx.GraphModule:
    """The model before dispatch, with symbolic sizes; its parameters stay what they are."""
    from torch.fx.experimental.proxy_tensor import make_fx

    traced = make_fx(model, tracing_mode="symbolic", pre_dispatch=True, _allow_non_fake_inputs=True)
    return traced(*inputs)


def without_fake_tensors() -> contextlib.AbstractContextManager[Any]:
    """A block in which tensors are real, inside a compilation whose tensors are fake."""
    from torch import _ops
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
    from torch.utils._python_dispatch import _disable_current_modes

    before_dispatch: Callable[[], int] = _ops._len_torch_dispatch_stack_pre_dispatch
    if not torch._C._len_torch_dispatch_stack() and not before_dispatch():
        return contextlib.nullcontext()
    stack = contextlib.ExitStack()
    stack.enter_context(disable_proxy_modes_tracing())
    stack.enter_context(_disable_current_modes())
    return stack


def onednn_takes(dtype: torch.dtype) -> bool:
    """Whether oneDNN packs convolution weights of this type on this CPU."""
    if not (torch._C._has_mkldnn and torch.backends.mkldnn.enabled):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


def pack_convolution_weight(
    arguments: Sequence[Any], input_size: tuple[int, ...]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from a convolution's dense weight to the same in oneDNN's format.

    Args:
        arguments: those of `aten.convolution`, not transposed.
        input_size: the sizes of its input; the format is the best for them.
    """
    _, _, _, stride, padding, dilation, _, _, groups = arguments
    given = (list(padding), list(stride), list(dilation), groups, list(input_size))

    def pack(weight: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, torch.ops.mkldnn._reorder_convolution_weight(weight, *given))

    return pack


def packed_convolution(arguments: Sequence[Any], packed: Any) -> tuple[OpOverload, tuple[Any, ...]]:
    """The operator of `aten.convolution` over a packed weight, and its arguments, without an epilogue."""
    image, _, bias, stride, padding, dilation, _, _, groups = arguments
    operator = torch.ops.mkldnn._convolution_pointwise.default
    return operator, (image, packed, bias, padding, stride, dilation, groups, "none", [], "")


def packed_convolution_onto(
    arguments: Sequence[Any], packed: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that adds `aten.convolution` over a packed weight to a tensor, in place."""
    image, _, bias, stride, padding, dilation, _, _, groups = arguments
    operator = torch.ops.mkldnn._convolution_pointwise_.binary
    scalars: list[float] = []
    given = (image, packed, bias, padding, stride, dilation, groups, "add", 1.0, None, scalars, None)
    return lambda other: cast(torch.Tensor, operator(other, *given))


def force_stride_order() -> OpOverload:
    """The operator that has inductor put a tensor into memory in an order of strides, if it is not so."""
    from torch._inductor import inductor_prims

    return cast(OpOverload, inductor_prims.force_stride_order)


def writes_cpp_wrapper() -> bool:
    """Whether inductor, as it is set now, calls kernels from C++; that crashes with lists of tensors."""
    from torch._inductor import config

    return bool(config.cpp_wrapper)


class RealConstantsAllowed:
    """Lets fake modes meet real tensors until the end of a block, as inductor does where it freezes."""

    def __init__(self) -> None:
        self._modes: list[tuple[FakeTensorMode, bool]] = []

    def allow(self, value: object) -> None:
        """Admits real constants to the fake mode of a value."""
        mode = getattr(value, "fake_mode", None)
        if mode is not None:
            self._modes.append((mode, mode.allow_non_fake_inputs))
            mode.allow_non_fake_inputs = True

    def __enter__(self) -> RealConstantsAllowed:
        return self

    def __exit__(self, *_: object) -> None:
        while self._modes:
            mode, before = self._modes.pop()
            mode.allow_non_fake_inputs = before


_SAME_MEMORY = """
#include <cstdint>
#include <cstring>
extern "C" int same_memory(
    const char* const* blocks, const std::int64_t* sizes, std::int64_t count, const char* expected) {
  for (std::int64_t i = 0; i < count; expected += sizes[i], ++i)
    if (std::memcmp(blocks[i], expected, sizes[i]) != 0) return 0;
  return 1;
}
"""


def compile_cpp(source: str, flags: Sequence[str] = ()) -> ctypes.CDLL | None:
    """The library of a C++ source, from inductor's cache where it is there; None if it does not compile.

    Args:
        source: the text.
        flags: further arguments of the compiler, which are part of the cache's key.
    """
    from torch._inductor import config
    from torch._inductor.codecache import CppCodeCache

    try:
        # A library serves the whole process, and `cpp.simdlen` one compilation, whose flags would come last.
        with config.patch({"cpp.simdlen": None}):
            return cast(ctypes.CDLL, CppCodeCache.load(source, extra_flags=tuple(flags)))
    except Exception:  # a missing compiler is no error here: the caller has a slower way
        return None


@functools.cache
def same_memory_function() -> Callable[..., int] | None:
    """A C function that compares blocks of memory with what they held; None where it cannot be compiled.

    Its arguments: addresses and sizes in bytes of the blocks, how many, and what they held, end to end.
    """
    library = compile_cpp(_SAME_MEMORY)
    if library is None:
        return None
    function = library.same_memory
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
    function.restype = ctypes.c_int
    return cast("Callable[..., int]", function)


_UNCHANGED = """
#include <Python.h>
#include <torch/csrc/autograd/python_variable.h>
#include <cstdint>
extern "C" int unchanged(
    PyObject* arguments, const std::int64_t* positions, std::int64_t count, PyObject* sources,
    const std::int64_t* versions, const std::int64_t* addresses) {
  try {
    for (std::int64_t i = 0; i < count; ++i) {
      PyObject* given = PyTuple_GET_ITEM(arguments, positions[i]);
      if (given != PyTuple_GET_ITEM(sources, i)) return 0;
      const at::Tensor& tensor = THPVariable_Unpack(given);
      if (tensor.unsafeGetTensorImpl()->version_counter().current_version() != versions[i]) return 0;
      if (reinterpret_cast<std::int64_t>(tensor.const_data_ptr()) != addresses[i]) return 0;
    }
  } catch (...) {  // a tensor without a version or without memory is not what it was
    return 0;
  }
  return 1;
}
"""


@functools.cache
def unchanged_function() -> Callable[..., int] | None:
    """A C function that tells whether tensors are what they were; None where it cannot be compiled.

    Its arguments: the tuple of a call's arguments; the positions there of the tensors and how many they are;
    the tuple of them as they were, their versions and the addresses of their memory. 300 tensors are compared
    in a few microseconds; by torch's Python methods it takes two hundred in a model's call, where none of the
    code is near.
    """
    library = compile_cpp(_UNCHANGED)
    if library is None:
        return None
    function = ctypes.PyDLL(library._name).unchanged  # holds the GIL, as it reads Python's objects
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [ctypes.py_object, pointer, count, ctypes.py_object, pointer, pointer]
    function.restype = ctypes.c_int
    return cast("Callable[..., int]", function)


@functools.cache
def _export_decompositions() -> tuple[dict[Any, Any], dict[Any, Any]]:
    """What `run_decompositions()` would work out anew at every call: implicit decompositions, and others."""
    from torch.export.exported_program import _split_decomp_table_to_cia_and_python_decomp

    table: dict[Any, Any] = {**torch.export.default_decompositions()}
    implicit, others = _split_decomp_table_to_cia_and_python_decomp(dict(table))
    return {op: (op in table, decompose) for op, decompose in implicit.items()}, others


def run_default_decompositions(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """`program.run_decompositions()` in a seventh of its time, for small programs.

    The public method overrides some 500 composite operators one by one, and puts them back. All that the
    program does not name decompose in that way without being told, but those that export keeps.
    """
    try:
        from torch.export.exported_program import _decompose_exported_program

        implicit, others = _export_decompositions()
    except ImportError:
        return program.run_decompositions()  # type: ignore[no-any-return]  # decorated without types
    named = {node.target for node in program.graph.nodes}
    return _decompose_exported_program(  # type: ignore[no-any-return]  # written without types
        program,
        cia_to_decomp={op: each for op, (known, each) in implicit.items() if op in named or not known},
        python_decomp_table=others,
        joint_loss_index=None,
        decompose_custom_triton_ops=False,
    )
