"""`fxpasses diff` on models that differ: what it names, its JSON, its exit status, and its errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import fxpasses
from fxpasses import cli
from fxpasses.report.report import Report


class Network(nn.Module):
    """Three pairs; with a residual, the second convolution's result is also added to the third's."""

    def __init__(self, *, residual: bool) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))
        self.residual = residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norms[0](self.convs[0](x)).relu()
        middle = self.convs[1](x)
        x = self.norms[2](self.convs[2](self.norms[1](middle).relu()))
        return x + middle if self.residual else x


@pytest.fixture
def saved(tmp_path: Path) -> tuple[str, str]:
    """Reports of the network without the residual and with it."""
    x, paths = torch.randn(2, 4, 8, 8), []
    for residual in (False, True):
        paths.append(str(tmp_path / f"{residual}.json"))
        fxpasses.explain(Network(residual=residual).eval(), x).save(paths[-1])
    return paths[0], paths[1]


def test_a_residual_that_was_added_names_module_rewrite_and_cost_and_fails(saved, capsys):
    assert cli.main(["diff", *saved, "--fail-on", "lost"]) == 1
    out = capsys.readouterr().out
    assert "lost: 1 rewrite\n" in out
    assert "efficient_conv_bn_eval at norms.1 (" in out
    assert "[multiple-users]" in out
    assert f"that was {4 * 2 * 4 * 8 * 8} bytes less to keep for the backward pass" in out
    assert "norms folded: 3 of 3 -> 2 of 3" in out
    assert "worse: lost" in out


def test_json_has_the_same(saved, capsys):
    assert cli.main(["diff", *saved, "--json", "--fail-on", "lost", "saved"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert [(each["rule"], each["place"], each["code"]) for each in data["lost"]] == [
        ("efficient_conv_bn_eval", "norms.1", "multiple-users")
    ]
    assert data["lost"][0]["figures"]["kept_bytes"] == 4 * 2 * 4 * 8 * 8
    assert data["worse"] == ["lost", "saved"]


@pytest.mark.parametrize("arguments", [[], ["--fail-on", "copies"]], ids=["nothing", "copies"])
def test_what_is_not_to_fail_on_does_not(saved, arguments):
    assert cli.main(["diff", saved[0], saved[0], "--fail-on", "lost"]) == 0
    assert cli.main(["diff", *saved[::-1], "--fail-on", "lost", "saved"]) == 0
    assert cli.main(["diff", *saved, *arguments]) == 0


def test_a_time_that_cannot_be_told_is_an_error_where_it_is_asked_for(saved, tmp_path, capsys):
    bare = tmp_path / "bare.json"
    Report().save(bare)
    assert cli.main(["diff", saved[0], str(bare), "--fail-on", "slower"]) == 2
    assert "--fail-on slower cannot be told" in capsys.readouterr().err


def test_a_report_comes_back_as_it_was_saved(saved):
    report = Report.load(saved[1])
    assert report.norms_left == 1
    assert Report.from_json(report.to_json()) == report


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot read"),
        ("", "not a report of fxpasses"),
        ("[1, 2]", "not a report of fxpasses"),
        ('{"schema": 99}', "of another version"),
        ("\udcff", "not a report of fxpasses"),
    ],
    ids=["missing", "empty", "list", "other version", "no text"],
)
def test_a_file_that_is_no_report_is_one_line(saved, tmp_path, capsys, content, words):
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert cli.main(["diff", saved[0], str(path)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert str(path) in error
    assert len(error.splitlines()) == 1


def test_a_kind_that_does_not_exist_is_refused(saved):
    with pytest.raises(SystemExit) as stop:
        cli.main(["diff", *saved, "--fail-on", "everything"])
    assert stop.value.code == 2
