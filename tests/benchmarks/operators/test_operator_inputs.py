"""Operator logs are read without being run, written as they were read, and made into legal arguments."""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks.operator_inputs import main
from benchmarks.operators.inputs.argument_rules import UnmaterialisableError
from benchmarks.operators.inputs.log import (
    LogError,
    OperatorLog,
    Sample,
    read_log,
    read_logs,
    resolve_operator,
    write_log,
)
from benchmarks.operators.inputs.materialise import Target, materialise
from benchmarks.operators.inputs.notation import (
    MAXIMUM_LINE,
    NotationError,
    SparseSpec,
    TensorSpec,
    format_call,
    parse_call,
)
from benchmarks.operators.inputs.recorder import OperatorInputsMode
from benchmarks.operators.inputs.suites import (
    LOGS,
    MODES,
    SUITES,
    Entry,
    SuiteError,
    entries_of,
    entry,
    load_suite,
    log_path,
    record,
)
from benchmarks.torch_internals import OpOverload
from fxpasses.cli.model_specs import load_model

aten = torch.ops.aten
CPU = Target(torch.device("cpu"))

# In the style of PyTorch's published logs, with every construct that they have.
PUBLISHED = """\
Operator: aten._embedding_bag.default
cnt: 2, ((T([965, 192], f16), T([54824], i64), T([1024], i64), False, 0, True, T([54824], f16)), {})
Operator: aten._to_copy.default
cnt: 1, ((T([1, 1024], i64),), {'dtype': i32, 'layout': torch.strided, 'device': 'cuda'})
cnt: 12, ((T([1, 16, 12, 5], f16, stride=(960, 5, 80, 1)),), {'dtype': f32, 'pin_memory': False})
Operator: aten.add.Tensor
cnt: 3, ((T([], f16), 0.0001), {})
cnt: 1, ((T([6, 3, 4], f16, stride=(0, 0, 0)), T([6, 3, 4], 'f16')), {})
cnt: 1, ((ST([965, 192], f16, torch.sparse_coo, False, 7), T([965, 192], f16)), {})
Operator: aten.cat.default
cnt: 1, (([T([2], f16), T([2], f16, (3,))], -1), {})
Operator: aten.convolution.default
cnt: 4, ((T([8, 4, 6, 6], f16), T([4, 4, 3, 3], f16), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1), {})
Operator: aten.gelu.default
cnt: 12, ((T([1, 4], c64),), {'approximate': 'tanh'})
Operator: aten.index.Tensor
cnt: 8, ((T([7, 5], b8), [None, T([6], i64)]), {})
Operator: aten.masked_fill.Scalar
cnt: 6, ((T([2, 2], f16), T([2, 2], b8), -inf), {})
cnt: 6, ((T([2, 2], f16), T([2, 2], u8), nan), {'dtype': torch.float16, 'memory_format': th.channels_last})
Operator: aten.slice_backward.default
cnt: 7, ((T([0, 90], f16), [0, 91], 1, 1, 9223372036854775807, 1), {})
Operator: aten.sum.SymInt
cnt: 1, ((T([12, 4], f16), [0], True), {})
"""


@pytest.fixture
def published(tmp_path: Path) -> Path:
    path = tmp_path / "published.txt"
    path.write_text(PUBLISHED)
    return path


def only_call(log: OperatorLog, operator: str):
    (sample,) = log.samples(operator)
    return sample.call


def test_every_construct_of_the_published_logs_is_read(published):
    log = read_log(published)
    assert [sample.count for sample in log.samples("aten._to_copy.default")] == [12, 1]
    assert only_call(log, "aten.convolution.default").args[2:] == (
        None,
        [1, 1],
        [1, 1],
        [1, 1],
        False,
        [0, 0],
        1,
    )
    strided, copied = (sample.call for sample in log.samples("aten._to_copy.default"))
    assert strided.args == (TensorSpec((1, 16, 12, 5), torch.float16, (960, 5, 80, 1)),)
    assert copied.kwargs == {"dtype": torch.int32, "layout": torch.strided, "device": "cuda"}
    assert only_call(log, "aten.cat.default").args == (
        [TensorSpec((2,), torch.float16), TensorSpec((2,), torch.float16, (3,))],
        -1,
    )
    assert only_call(log, "aten.index.Tensor").args[1] == [None, TensorSpec((6,), torch.int64)]
    assert only_call(log, "aten.gelu.default").kwargs == {"approximate": "tanh"}
    assert only_call(log, "aten.slice_backward.default").args[4] == 2**63 - 1
    infinite, undefined = (sample.call for sample in log.samples("aten.masked_fill.Scalar"))
    assert infinite.args[2] == -math.inf
    assert math.isnan(undefined.args[2])
    assert undefined.kwargs == {"dtype": torch.float16, "memory_format": torch.channels_last}


def test_a_quoted_dtype_is_a_dtype_and_a_scalar_tensor_has_no_dimensions(published):
    scalar, expanded, _ = (sample.call for sample in read_log(published).samples("aten.add.Tensor"))
    assert scalar.args == (TensorSpec((), torch.float16), 0.0001)
    assert expanded.args[1] == TensorSpec((6, 3, 4), torch.float16)


def test_a_sparse_argument_is_kept_but_never_made(published):
    sparse = read_log(published).samples("aten.add.Tensor")[2].call
    assert sparse.args[0] == SparseSpec((965, 192), torch.float16, torch.sparse_coo, False, 7)
    with pytest.raises(UnmaterialisableError, match="sparse"):
        materialise(aten.add.Tensor, sparse, CPU)


def test_a_name_that_torch_has_changed_since_is_translated(published):
    assert "aten.sum.dim_IntList" in read_log(published).operators
    assert resolve_operator("aten.sum.SymInt") is aten.sum.dim_IntList


def test_what_is_read_is_written_alike(published, tmp_path):
    log = read_log(published)
    counts = {
        name: Counter({sample.text: sample.count for sample in log.samples(name)}) for name in log.names()
    }
    write_log(tmp_path / "again.txt", counts)
    again = read_log(tmp_path / "again.txt")
    assert again.names() == log.names()
    for name in log.names():
        assert {sample.text: sample.count for sample in again.samples(name)} == dict(counts[name])


def test_compressed_logs_blank_lines_and_comments_are_read(tmp_path):
    text = b"# by hand\nOperator: aten.relu.default\n\ncnt: 1, ((T([2], f32),), {})\n# end\n"
    (tmp_path / "log.txt.gz").write_bytes(gzip.compress(text))
    assert read_log(tmp_path / "log.txt.gz").samples("aten.relu.default")[0].source == "log.txt.gz:4"


def test_a_complex_number_and_a_device_are_read():
    call = parse_call("((1-2j, -3j, device(type='cuda', index=0)), {})")
    assert call.args == (1 - 2j, -3j, "cuda")
    assert parse_call(format_call(call)) == call


HOSTILE = [
    "((__import__('os').system('touch {victim}'),), {{}})",
    "__import__('os').system('touch {victim}')",
    "((open('{victim}', 'w'),), {{}})",
    "((exec(\"open('{victim}', 'w')\"),), {{}})",
    "((T([1], f32), [open(x, 'w') for x in ['{victim}']]), {{}})",
    "((lambda: open('{victim}', 'w'),), {{}})",
    "((torch.load,), {{}})",
    "((torch.hub.load('{victim}'),), {{}})",
    "((T.__class__,), {{}})",
    "((f'{{open(1)}}',), {{}})",
    "((9**9**9,), {{}})",
    "((T([2], f32) if 1 else 0,), {{}})",
    "((*[1, 2],), {{}})",
    "((1,), {{**{{}}}})",
    "((b'bytes',), {{}})",
    "((...,), {{}})",
    "((unknown,), {{}})",
    "((T([2]),), {{}})",
    "((T([2], f32, (1,), 4),), {{}})",
    "((T([2], f32, sizes=1),), {{}})",
    "((T([2], f32, stride=(1, 1)),), {{}})",
    "((T([-1], f32),), {{}})",
    "((T([True], f32),), {{}})",
    "((T([2], 4),), {{}})",
    "((T([1.5], f32),), {{}})",
    "((T(" + "[1]".replace("1", "1, " * 65) + ", f32),), {{}})",
    "((ST([2], f32, 1, 2),), {{}})",
    "((1" + "0" * 30 + ",), {{}})",
    "((-'text',), {{}})",
    "((- -1,), {{}})",
    "((1 + 1,), {{}})",
    "((1,), {{1: 2}})",
    "([1], {{}})",
    "((1,),)",
    "(1, 2, 3)",
    "((T([2], f32),), {{}}",
    "(" * 100 + ")" * 100,
    "(" * 100_000,
    "((" + "-" * 1000 + "1,), {{}})",
    "((1" + " + 1j" * 100_000 + ",), {{}})",
    "((torch" + ".a" * 100_000 + ",), {{}})",
    "((x" + "()" * 100_000 + ",), {{}})",
    "((" + "'a' " * 10 + "'''),), {{}})",
    "((1,\x00), {{}})",
    "((1" + " " * MAXIMUM_LINE + ",), {{}})",
]


@pytest.mark.parametrize("line", HOSTILE, ids=lambda line: line[:40])
def test_a_hostile_or_malformed_line_is_inert_and_named(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    victim, path = tmp_path / "victim", tmp_path / "log.txt"
    text = line.format(victim="victim")
    path.write_text(f"Operator: aten.relu.default\ncnt: 1, ((T([2], f32),), {{}})\ncnt: 1, {text}\n")
    with pytest.raises(LogError) as refusal:
        read_log(path)
    assert str(refusal.value).startswith(f"{path}:3: ")
    assert len(str(refusal.value)) < 500
    assert not victim.exists()


@pytest.mark.parametrize(
    "line",
    [
        "cnt: x, ((T([2], f32),), {})",
        "cnt: 0, ((T([2], f32),), {})",
        "cnt: __import__('os'), ((T([2], f32),), {})",
        "Operator: aten.relu.default; import os",
        "Operator: __import__('os')",
        "Operator: aten.relu",
        "something else",
    ],
)
def test_a_line_that_is_neither_a_heading_nor_a_sample_is_refused(line, tmp_path):
    path = tmp_path / "log.txt"
    path.write_text(f"Operator: aten.relu.default\n{line}\n")
    with pytest.raises(LogError, match=r"log\.txt:2: "):
        read_log(path)


def test_a_sample_ahead_of_any_operator_is_refused(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text("cnt: 1, ((T([2], f32),), {})\n")
    with pytest.raises(LogError, match=r"log\.txt:1: expected 'Operator"):
        read_log(path)


def test_a_missing_and_a_damaged_file_are_named(tmp_path):
    damaged = tmp_path / "damaged.txt.gz"
    damaged.write_bytes(gzip.compress(PUBLISHED.encode())[:-30])
    for path in (damaged, tmp_path / "missing.txt"):
        with pytest.raises(LogError, match=path.name):
            read_log(path)


def test_an_operator_that_torch_does_not_have_is_named():
    for name in ("aten.no_such_operator.default", "aten.relu.no_such_overload", "nowhere.relu.default"):
        with pytest.raises(LogError, match=name):
            resolve_operator(name)


def test_occurrences_of_an_input_add_up_over_files(published):
    once, twice = read_log(published), read_logs([published, published])
    for name in once.names():
        expected = [2 * sample.count for sample in once.samples(name)]
        assert [sample.count for sample in twice.samples(name)] == expected


# Recording.


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, 4, 3)
        self.batch_norm = torch.nn.BatchNorm2d(4)

    def forward(self, x):
        return F.relu_(self.batch_norm(self.convolution(x))).flatten(1)[:, ::2]


def test_what_is_recorded_is_what_is_read_back(tmp_path):
    model = Block()
    with OperatorInputsMode() as recorder:
        for _ in range(3):
            model(torch.randn(2, 3, 8, 8)).sum().backward()
    write_log(tmp_path / "log.txt", recorder.counts)
    log = read_log(tmp_path / "log.txt")
    (sample,) = log.samples("aten.convolution.default")
    assert sample.count == 3
    assert sample.call.args[:3] == (
        TensorSpec((2, 3, 8, 8), torch.float32),
        TensorSpec((4, 3, 3, 3), torch.float32),
        TensorSpec((4,), torch.float32),
    )
    backward = only_call(log, "aten.convolution_backward.default")
    assert backward.args[-1] == [False, True, True]
    for name in log.names():
        assert {sample.text: sample.count for sample in log.samples(name)} == dict(recorder.counts[name])


def test_views_and_constructors_are_not_recorded():
    with OperatorInputsMode() as recorder:
        x = torch.zeros(2, 3).view(6).reshape(3, 2).t()
        torch.zeros_like(x).detach()
        x.new_empty(3)
        x.as_strided_((2,), (1,))
        assert not recorder.counts
        x.relu()
    assert list(recorder.counts) == ["aten.relu.default"]


def test_strides_are_recorded_where_a_tensor_is_not_contiguous():
    with OperatorInputsMode() as recorder:
        torch.randn(2, 3).t().exp()
        torch.randn(1, 3).expand(2, 3).exp()
        torch.randn(2, 3).exp()
    assert recorder.counts["aten.exp.default"] == {
        "((T([3, 2], f32, stride=(1, 3)),), {})": 1,
        "((T([2, 3], f32, stride=(0, 1)),), {})": 1,
        "((T([2, 3], f32),), {})": 1,
    }


def test_recording_a_suite_model_computes_nothing_and_sees_the_backward():
    small = Entry("torchvision:squeezenet1_1", 2, (3, 64, 64))
    inference, training = (record(small, mode).counts for mode in MODES)
    assert "aten.convolution_backward.default" not in inference
    assert sum(training["aten.convolution_backward.default"].values()) == sum(
        inference["aten.convolution.default"].values()
    )
    assert any("T([2, 3, 64, 64], f32)" in text for text in inference["aten.convolution.default"])


def test_a_fake_model_is_recorded_like_a_real_one():
    small = Entry("torchvision:shufflenet_v2_x0_5", 2, (3, 64, 64))
    model, x = load_model(small.spec), torch.randn(2, 3, 64, 64)
    for mode in MODES:
        model.train(mode == "training")
        with torch.set_grad_enabled(model.training), OperatorInputsMode() as real:
            logits = model(x)
            if model.training:
                F.cross_entropy(logits, torch.zeros(2, dtype=torch.int64)).backward()
        assert dict(record(small, mode).counts) == dict(real.counts)


# What is shipped.


@pytest.mark.parametrize("suite", SUITES)
def test_every_shipped_log_parses_and_names_operators_that_exist(suite):
    for mode in MODES:
        log = load_suite(suite, mode)
        assert log.names()
        for name in log.names():
            assert str(resolve_operator(name)) == name
        assert any("backward" in name for name in log.names()) == (mode == "training")


def test_every_shipped_log_is_in_the_manifest_and_all_are_small():
    files = [path for path in LOGS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 3_000_000
    expected = {LOGS / suite / "manifest.json" for suite in SUITES}
    for suite in SUITES:
        manifest = json.loads((LOGS / suite / "manifest.json").read_text())
        assert sorted(manifest) == sorted(entry.name for entry in entries_of(suite))
        for recorded in entries_of(suite):
            assert manifest[recorded.name]["batch"] == recorded.batch
            expected |= {log_path(LOGS, suite, recorded.name, mode) for mode in MODES}
    assert set(files) == expected


RELU = "Operator: aten.relu.default\ncnt: {count}, ((T([2], f32),), {{}})\n"


def occurrences(suite, folder, mode="all"):
    (sample,) = load_suite(suite, mode, folder).samples("aten.relu.default")
    return sample.count


@pytest.fixture
def published_suites(tmp_path):
    """A folder like PyTorch's `operator_inp_logs`; its counts tell the logs apart."""
    folder = tmp_path / "operator_inp_logs"
    files = ["hf_train/A_training.txt", "hf_train/B_training.txt.gz", "torchbench_train/C_training.txt"]
    files += ["timm_train/D_training.txt", "timm_train/E_inference.txt", "timm_train/README.md"]
    for place, name in enumerate(files):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = RELU.format(count=10**place).encode()
        path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    return folder


def test_a_suite_of_pytorch_is_read_from_its_folder(published_suites):
    assert occurrences("huggingface", published_suites) == 11
    assert occurrences("huggingface", published_suites / "hf_train") == 11
    assert occurrences("torchbench", published_suites) == 100
    assert occurrences("timm", published_suites) == 11000
    assert occurrences("timm", published_suites, "training") == 1000
    assert occurrences("timm", published_suites, "inference") == 10000


def test_a_folder_of_any_other_name_may_be_the_suites_own(published_suites):
    renamed = (published_suites / "hf_train").rename(published_suites / "mine")
    assert occurrences("torchbench", renamed) == 11


def test_logs_that_were_recorded_into_a_folder_are_read_from_there(tmp_path):
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "A_inference.txt").write_text(RELU.format(count=7))
    assert occurrences("transformers", tmp_path) == 7


@pytest.mark.parametrize(
    ("suite", "place", "mode", "message"),
    [
        ("huggingface", None, "all", "are not shipped.*by --log-folder.*transformers"),
        ("torchbench", None, "training", "are not shipped"),
        ("huggingface", "timm_train", "all", "another suite than 'huggingface'"),
        ("timm", "hf_train", "all", "another suite than 'timm'"),
        ("torchvision", "", "all", "no logs .* of suite 'torchvision'"),
        ("huggingface", "", "inference", "no logs .*_inference"),
        ("huggingface", "missing", "all", "no logs"),
        ("torchbanch", None, "all", "unknown suite"),
    ],
)
def test_a_suite_without_logs_is_refused_with_where_they_would_be(
    published_suites, suite, place, mode, message
):
    with pytest.raises(SuiteError, match=message):
        load_suite(suite, mode, None if place is None else published_suites / place)


def test_the_command_records_anew_what_is_shipped(tmp_path, capsys):
    arguments = ["--suite", "torchvision", "--models", "squeezenet1_1", "--output", str(tmp_path)]
    assert main([*arguments, "--modes", "inference", "--record"]) == 0
    name = "squeezenet1_1_inference.txt"
    assert name in capsys.readouterr().out
    assert read_log(tmp_path / "torchvision" / name).names() == read_log(LOGS / "torchvision" / name).names()


def test_an_unknown_model_is_refused_with_the_closest(capsys):
    assert main(["--suite", "timm", "--models", "resnet51"]) == 2
    assert "Did you mean 'resnet50'" in capsys.readouterr().err
    with pytest.raises(SuiteError, match="unknown suite"):
        entry("torchbench", "resnet18")


# Making arguments.


def made(operator: OpOverload, text: str, target: Target = CPU):
    return materialise(operator, parse_call(text), target)


def test_strides_are_honoured_gaps_and_overlaps_included():
    text = (
        "((T([2, 3], f32, stride=(1, 2)), T([2, 3], f32, stride=(0, 0)), T([2, 3], f32, stride=(8, 2)), "
        "T([3, 2], f32, stride=(1, 1))), {})"
    )
    tensors, _ = materialise(aten.addcmul.default, _three_tensors(text), CPU)
    assert [tensor.stride() for tensor in tensors] == [(1, 2), (0, 0), (8, 2)]
    (overlapping,), _ = made(aten.relu.default, "((T([3, 2], f32, stride=(1, 1)),), {})")
    assert overlapping.stride() == (1, 1)
    assert overlapping[1, 0] == overlapping[0, 1]
    assert overlapping.untyped_storage().nbytes() == 4 * 4


def _three_tensors(text: str):
    call = parse_call(text)
    return type(call)(call.args[:3], {})


IN_RANGE = [
    (aten.embedding.default, "((T([5, 4], f32), T([100], i64), 1), {})"),
    (aten.embedding_dense_backward.default, "((T([100, 4], f32), T([100], i64), 5, -1, False), {})"),
    (aten._embedding_bag.default, "((T([5, 4], f32), T([100], i64), T([9], i64), False, 0, False), {})"),
    (aten.gather.default, "((T([5, 4], f32), -1, T([5, 100], i64)), {})"),
    (aten.gather.default, "((T([], f32), 0, T([], i64)), {})"),
    (aten.index.Tensor, "((T([3, 5, 4], f32), [None, T([100], i64), T([100], i64)]), {})"),
    (aten.index_add.default, "((T([5, 4], f32), 0, T([100], i64), T([100, 4], f32)), {})"),
    (aten.index_put_.default, "((T([5, 4], f32), [T([100], i64)], T([100, 4], f32), True), {})"),
    (aten.index_put.default, "((T([5, 4], f32), [T([3, 1], i64), T([1, 2], i64)], T([3, 2], f32)), {})"),
    (aten.index_select.default, "((T([5, 4], f32), 1, T([100], i32)), {})"),
    (aten.max_pool2d_with_indices_backward.default, None),
    (aten.nll_loss_forward.default, "((T([100, 5], f32), T([100], i64), None, 1, -100), {})"),
    (aten.nll_loss_forward.default, "((T([5], f32), T([], i64), None, 1, -100), {})"),
    (
        aten.nll_loss_backward.default,
        "((T([], f32), T([100, 5], f32), T([100], i64), None, 1, -100, T([], f32)), {})",
    ),
    (aten.nll_loss2d_forward.default, "((T([2, 5, 6, 6], f32), T([2, 6, 6], i64), None, 1, -100), {})"),
    (aten.scatter.src, "((T([5, 4], f32), 0, T([3, 4], i64), T([3, 4], f32)), {})"),
    (aten.scatter_add.default, "((T([5, 4], f32), 0, T([100, 4], i64), T([100, 4], f32)), {})"),
    (aten.take.default, "((T([5, 4], f32), T([100], i64)), {})"),
]
POOLING = (
    "((T([2, 3, 4, 4], f32), T([2, 3, 8, 8], f32), [2, 2], [2, 2], [0, 0], [1, 1], False, "
    "T([2, 3, 4, 4], i64)), {})"
)


@pytest.mark.parametrize(("operator", "text"), IN_RANGE, ids=lambda value: str(value)[:40])
def test_indices_are_made_so_that_the_operator_accepts_them(operator, text):
    args, kwargs = made(operator, text or POOLING)
    result = operator(*args, **kwargs)
    first = result[0] if isinstance(result, tuple) else result
    assert first.isfinite().all()


def test_the_indices_of_a_pooling_are_those_of_that_pooling():
    args, _ = made(aten.max_pool2d_with_indices_backward.default, POOLING)
    x = args[1].clone().requires_grad_()
    F.max_pool2d(x, 2).backward(args[0])
    assert torch.equal(aten.max_pool2d_with_indices_backward.default(*args), x.grad)


def test_writing_without_accumulation_never_writes_twice_to_a_place():
    args, _ = made(
        aten.index_put.default, "((T([5, 4], f32), [T([20], i64), T([20], i64)], T([20], f32)), {})"
    )
    assert len(set(zip(*(index.tolist() for index in args[1]), strict=True))) == 20
    args, _ = made(aten.scatter.src, "((T([5, 4], f32), 0, T([5, 4], i64), T([5, 4], f32)), {})")
    assert all(len(set(column.tolist())) == 5 for column in args[2].unbind(1))


def test_variances_are_positive_and_free_arguments_are_not_confined():
    text = "((T([2, 3, 4], f32), T([3], f32), T([3], f32), T([3], f32), T([3], f32), False, 0.1, 1e-05), {})"
    args, _ = made(aten.native_batch_norm.default, text)
    assert (args[4] > 0).all()
    assert (args[0] < 0).any()


def test_floating_dtypes_are_converted_and_others_kept():
    target = Target(torch.device("cpu"), torch.float32)
    args, kwargs = made(
        aten._to_copy.default,
        "((T([2], i64),), {'dtype': f16, 'device': 'cuda', 'layout': torch.strided})",
        target,
    )
    assert args[0].dtype is torch.int64
    assert kwargs == {
        "dtype": torch.float32,
        "device": torch.device("cpu"),
        "layout": torch.strided,
    }
    args, _ = made(aten.add.Tensor, "((T([2], f16), T([2], b8)), {})", target)
    assert [argument.dtype for argument in args] == [torch.float32, torch.bool]
    args, _ = made(aten.add.Tensor, "((T([2], f16), T([2], f64)), {})")
    assert [argument.dtype for argument in args] == [torch.float16, torch.float64]
    args, kwargs = made(aten._to_copy.default, "((T([2], c32),), {'dtype': c32})", target)
    assert (args[0].dtype, kwargs["dtype"]) == (torch.complex64, torch.complex64)


def test_a_mask_value_is_cut_to_the_range_of_a_narrower_dtype():
    text = "((T([2], f32), T([2], b8), -3.4028234663852886e+38), {})"
    half = Target(torch.device("cpu"), torch.float16)
    assert made(aten.masked_fill.Scalar, text, half)[0][2] == -65504.0
    assert made(aten.masked_fill.Scalar, text)[0][2] == -3.4028234663852886e38
    infinite = "((T([2], f32), T([2], b8), -inf), {})"
    assert made(aten.masked_fill.Scalar, infinite, half)[0][2] == -math.inf


def test_channels_last_is_given_to_images_and_volumes_only():
    target = Target(torch.device("cpu"), channels_last=True)
    args, _ = made(
        aten.cat.default, "(([T([2, 3, 4, 5], f32), T([2, 3, 4, 5, 6], f32), T([2, 3], f32)],), {})", target
    )
    image, volume, matrix = args[0]
    assert image.is_contiguous(memory_format=torch.channels_last)
    assert volume.is_contiguous(memory_format=torch.channels_last_3d)
    assert matrix.is_contiguous()


@pytest.mark.parametrize(
    ("operator", "text", "reason"),
    [
        (aten.relu.default, "((T([9223372036854775807, 9223372036854775807], f32),), {})", "needs .* bytes"),
        (aten.relu.default, "((T([2, 2], f32, stride=(9223372036854775807, 1)),), {})", "needs .* bytes"),
        (aten.relu.default, "((), {})", "'self' is missing"),
        (aten.relu.default, "((T([2], f32), 1, 2), {})", "3 positional"),
        (aten.relu.default, "((T([2], f32),), {'alpha': 1})", "'alpha'"),
        (aten.index.Tensor, "((T([4], f32), [T([4], b8)]), {})", "mask"),
        (aten.index.Tensor, "((T([4], f32), [T([4], i64), T([4], i64)]), {})", "2 indices for 1"),
        (aten.embedding.default, "((T([0, 4], f32), T([4], i64)), {})", "no index is valid"),
        (aten.embedding.default, "((3, T([4], i64)), {})", "should be a tensor"),
        (aten.gather.default, "((T([4], f32), None, T([4], i64)), {})", "should be an integer"),
    ],
)
def test_arguments_that_cannot_be_made_have_a_reason(operator, text, reason):
    with pytest.raises(UnmaterialisableError, match=reason):
        made(operator, text)


def test_a_broadcast_tensor_needs_only_the_memory_of_its_storage():
    target = Target(torch.device("cpu"), limit=4)
    (x,), _ = made(aten.relu.default, "((T([1000000, 1000000], f32, stride=(0, 0)),), {})", target)
    assert x.shape == (1_000_000, 1_000_000)


def test_the_same_seed_makes_the_same_values():
    text = "((T([5], f32),), {})"
    first, second, other = (
        made(aten.relu.default, text, Target(CPU.device, seed=seed))[0][0] for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_a_sample_knows_its_text():
    text = "((T([5], f32),), {})"
    assert Sample(parse_call(text), 1, "here:1").text == text
    with pytest.raises(NotationError):
        parse_call("T([5], f32)")
