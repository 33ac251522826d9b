"""One dynamic artifact at many sizes: ratios from turns, results checked at each, and graphs counted."""

from __future__ import annotations

import contextlib

import pytest

from benchmarks import sizes
from benchmarks.models.cases import Case
from benchmarks.models.messages import CountGraphs, Prepare, Prepared, TimeSteps
from benchmarks.models.variants import parse_variant
from benchmarks.models.worker import Server
from benchmarks.sizes import DYNAMIC, STATIC, STOCK, main
from tests.benchmarks.refusals import refusal

TINY = "tests.benchmarks.tiny_models:tiny"


class Told:
    """A process that takes so long for an image, and captures a graph for each size it is asked for."""

    def __init__(self, seconds):
        self.seconds, self.seen = seconds, set()

    def request(self, message):
        if isinstance(message, CountGraphs):
            return len(self.seen)
        self.seen.add(message.case)
        return self.seconds * message.case.batch


def test_ratios_are_taken_to_stock_and_to_the_static_artifact(monkeypatch, capsys):
    @contextlib.contextmanager
    def started(case, weights):
        yield {STOCK: Told(3.0), DYNAMIC: Told(2.0), STATIC: Told(1.0)}

    monkeypatch.setattr(sizes, "started", started)
    assert main(["--models", "some", "--sizes", "2x32,4x64", "--rounds", "7"]) == 0
    printed = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if "[" in line}
    assert rows["2x32"] == ["4000.00", "1.500", "[1.500,", "1.500]", "0.500", "[0.500,", "0.500]"]
    assert rows["4x64"][0] == "8000.00"
    assert rows["mean"] == ["1.500", "[1.500,", "1.500]", "0.500", "[0.500,", "0.500]"]
    assert f"{STOCK} 2, {DYNAMIC} 2, {STATIC} 2" in printed


@pytest.mark.parametrize(("dynamic", "captured"), [("all", 1), ("none", 2)])
def test_a_prepared_variant_is_timed_at_other_sizes(monkeypatch, dynamic, captured):
    monkeypatch.setattr("benchmarks.models.worker.SAMPLE_SECONDS", 0.001)
    server, case = Server(), Case(TINY, batch=2, size=16, dynamic=dynamic)
    before = server.answer(CountGraphs())
    told = server.answer(Prepare(case, parse_variant("fxpasses:inner=aot_eager"), None))
    assert isinstance(told, Prepared)
    assert server.answer(TimeSteps()) > 0
    assert server.answer(TimeSteps(Case(TINY, batch=3, size=24))) > 0
    assert server.answer(CountGraphs()) - before == captured


def test_wrong_results_at_another_size_are_no_time(monkeypatch):
    monkeypatch.setattr("benchmarks.models.worker.SAMPLE_SECONDS", 0.001)
    server = Server()
    server.answer(Prepare(Case(TINY, batch=2, size=16), parse_variant("eager"), None))
    right = server._built
    server._built = lambda images: right(images) * 1.1
    with pytest.raises(RuntimeError, match="batch 3, size 16: eager's result is"):
        server.answer(TimeSteps(Case(TINY, batch=3, size=16)))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--sizes", "8,224"], "write BATCHxSIZE"),
        (["--sizes", "0x224"], "must be at least 1"),
        (["--rounds", "1"], "cannot be shared"),
        (["--weights", "some"], "some"),
    ],
    ids=lambda given: given[-1] if isinstance(given, list) else "",
)
def test_arguments_that_measure_nothing_are_refused(capsys, arguments, reason):
    assert reason in refusal(main, arguments, capsys)
