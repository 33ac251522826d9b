"""Operator logs are read without being run and written as they were read; what is hostile stays inert."""

from __future__ import annotations

import gzip
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

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
    counts = {name: Counter({each.text: each.count for each in log.samples(name)}) for name in log.names()}
    write_log(tmp_path / "again.txt", counts)
    again = read_log(tmp_path / "again.txt")
    assert again.names() == log.names()
    for name in log.names():
        assert {each.text: each.count for each in again.samples(name)} == dict(counts[name])


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
        expected = [2 * each.count for each in once.samples(name)]
        assert [each.count for each in twice.samples(name)] == expected


def test_a_sample_knows_its_text():
    text = "((T([5], f32),), {})"
    assert Sample(parse_call(text), 1, "here:1").text == text
    with pytest.raises(NotationError):
        parse_call("T([5], f32)")
