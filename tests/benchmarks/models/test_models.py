"""The command line of the model benchmark, from the names it takes to the status it ends with."""

from __future__ import annotations

import copy
import csv
import json
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks.models import __main__ as models
from benchmarks.models import suite
from benchmarks.models.cases import Case, build_inputs, build_model
from benchmarks.models.reporting import plot_report, print_report
from benchmarks.models.results import NoFigureError, Report, load_report
from benchmarks.models.suite import Suite, run_suite
from benchmarks.models.variants import (
    Variant,
    VariantError,
    build_variant,
    parse_variant,
    parse_variants,
    slowed,
)
from benchmarks.models.worker import Server
from benchmarks.models.workers import WorkerError

ROOT = Path(__file__).resolve().parents[3]
TINY = "tests.benchmarks.tiny_models:tiny"
SELF_TEST = ("--launches", "8", "--rounds", "64", "--threads", "1")  # an odd one in eight moves no median
WRONG = "tests.benchmarks.tiny_models:wrong_when_compiled"


@pytest.mark.parametrize(
    ("text", "variant"),
    [
        ("eager", Variant("eager", "eager")),
        ("a=inductor", Variant("a", "inductor")),
        ("fxpasses:weights=cached", Variant("fxpasses:weights=cached", "fxpasses", {"weights": "cached"})),
        (
            "best=fxpasses:weights=cached;layout=auto;limit=3",
            Variant("best", "fxpasses", {"weights": "cached", "layout": "auto", "limit": 3}),
        ),
        (
            "fxpasses:disable=efficient_conv_bn_eval,layout",
            Variant(
                "fxpasses:disable=efficient_conv_bn_eval,layout",
                "fxpasses",
                {"disable": ("efficient_conv_bn_eval", "layout")},
            ),
        ),
        ("slowed(1.1):inductor", Variant("slowed(1.1):inductor", "inductor", slowdown=1.1)),
        ("slow=slowed(2):eager", Variant("slow", "eager", slowdown=2.0)),
    ],
)
def test_a_variant_is_a_name_a_kind_and_options(text, variant):
    assert parse_variant(text) == variant


def test_a_comma_inside_a_field_of_several_names_belongs_to_the_field():
    text = "eager,fxpasses:weights=cached;disable=efficient_conv_bn_eval,layout,a=inductor,slowed(1.1):eager"
    assert [variant.name for variant in parse_variants(text)] == [
        "eager",
        "fxpasses:weights=cached;disable=efficient_conv_bn_eval,layout",
        "a",
        "slowed(1.1):eager",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("inductr", "unknown variant 'inductr'. Did you mean 'inductor'?"),
        ("", "unknown variant ''"),
        ("eager,,inductor", "unknown variant ''"),
        ("inductor:freezing=1", "only fxpasses takes fields"),
        (
            "fxpasses:weigths=cached",
            "Did you mean 'weights'? Valid: disable, guards, inductor, inner, io, keep_repro",
        ),
        ("fxpasses:weights=frozen", "Valid: baked, cached, live"),
        ("fxpasses:weights", "is not FIELD=VALUE"),
        ("fxpasses:weights=", "is not FIELD=VALUE"),
        ("fxpasses:limit=1;limit=2", "given twice"),
        ("fxpasses:inductor=x", "mapping"),
        ("slowed(0.5):eager", "does not slow down"),
        ("inductor,inductor", "write a=inductor,b=inductor"),
    ],
)
def test_what_is_no_variant_is_refused_with_what_is(text, message):
    with pytest.raises(VariantError) as error:
        parse_variants(text)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--variants eager,fxpasses:colour=red", "unknown option 'colour'"),
        ("--variants openvino --mode training", "cannot train"),
        ("--variants inductor-frozen --mode frozen-training", "cannot train"),
        ("--variants onnxruntime --dtype bfloat16", "float32 or float16"),
        ("--dynamic batch", "--batch 2 or more"),
        ("--device cuda:99", "does not exist here"),
        ("--device tpu", "write cpu or cuda"),
        ("--rounds 0", "measures nothing"),
        ("--launches 0", "starts nothing"),
        ("--at-once 0", "prepares nothing"),
        ("--models ,", "names no model"),
        ("--baseline openvino", "unknown baseline 'openvino'"),
        ("--only-saved-bytes", "inference saves nothing"),
        ("--require fast", "gate 'fast'"),
        ("--json no/such/folder/x.json", "does not exist; create it"),
        ("--mode fast", "invalid choice"),
    ],
)
def test_bad_arguments_end_with_status_two_before_anything_is_started(
    arguments, message, monkeypatch, capsys
):
    def start(*_: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(models, "check_models", start)
    with pytest.raises(SystemExit) as exit_:
        models.main(arguments.split())
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_the_baseline_is_inductor_where_there_is_one():
    parser = models._parser()
    for variants, given, expected in (
        ("eager,inductor", [], "inductor"),
        ("eager,onnxruntime", [], "eager"),
        ("eager,inductor", ["--baseline", "eager"], "eager"),
    ):
        _, _, baseline = models._plan(parser.parse_args(["--variants", variants, *given]))
        assert baseline == expected


def test_a_slowed_call_takes_its_factor_of_its_own_time(monkeypatch):
    now = [0.0]

    def tick() -> float:
        now[0] += 0.001
        return now[0]

    def work() -> str:
        now[0] += 1.0
        return "done"

    monkeypatch.setattr("benchmarks.models.variants.time.perf_counter", tick)
    assert slowed(work, 1.5)() == "done"
    assert now[0] == pytest.approx(1.5, abs=0.01)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_another_runtime_computes_what_eager_computes(runtime):
    for library in (runtime, "onnx", "onnxscript"):
        pytest.importorskip(library, reason=f"{library} is not installed: pip install -e '.[bench]'")
    case = Case(TINY, batch=2, size=16, threads=1)
    model = build_model(case)
    inputs = build_inputs(case, model)
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(*(tensor.double() for tensor in inputs))
        (found,) = build_variant(parse_variant(runtime), case, model, inputs)(*inputs)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def local_workers(monkeypatch):
    """Workers that answer in this process: the suite's own logic, without starting any."""

    class LocalWorker:
        def __init__(self) -> None:
            self.server = Server()

        def request(self, message):
            try:
                return self.server.answer(message)
            except Exception as error:
                raise WorkerError(f"{type(error).__name__}: {error}", type(error).__name__) from error

        def close(self) -> None:
            self.server = Server()

    @contextmanager
    def worker(_suite, _cache):
        yield LocalWorker()

    monkeypatch.setattr(suite, "_worker", worker)


def measure(names: tuple[str, ...], variants: str, **fields) -> tuple[Report, list[int]]:
    plan = Suite(Case("", batch=2, size=8, **fields), names, parse_variants(variants), rounds=2)
    done: list[int] = []
    results = run_suite(plan, lambda text, units=0: done.append(units))
    assert sum(done) == plan.units_of_work
    return Report(plan.case.to_json(), {}, "eager", results), done


@pytest.mark.usefixtures("local_workers")
def test_a_wrong_variant_has_no_time_and_the_others_go_on():
    report, _ = measure((WRONG, TINY), "eager,fxpasses:inner=eager")
    wrong = report.models[0].variant("fxpasses:inner=eager")
    assert (wrong.status, wrong.seconds) == ("wrong", ())
    assert "output 0" in str(wrong.message)
    assert len(report.models[0].seconds("eager")) == 2
    assert len(report.models[1].seconds("fxpasses:inner=eager")) == 2
    with pytest.raises(NoFigureError, match="is wrong"):
        report.geometric_mean("fxpasses:inner=eager", "eager")


@pytest.mark.usefixtures("local_workers")
def test_a_variant_that_crashes_is_reported_and_the_others_go_on():
    report, _ = measure((TINY,), "eager,fxpasses:inner=no_such_backend")
    crashed = report.models[0].variant("fxpasses:inner=no_such_backend")
    assert (crashed.status, crashed.seconds) == ("failed", ())
    assert "no_such_backend" in str(crashed.message)
    assert len(report.models[0].seconds("eager")) == 2


@pytest.mark.usefixtures("local_workers")
def test_a_model_without_a_reference_fails_and_the_next_goes_on():
    report, _ = measure(("tests.benchmarks.tiny_models:random", TINY), "eager")
    assert report.models[0].variant("eager").status == "failed"
    assert "random numbers" in str(report.models[0].variant("eager").message)
    assert report.models[1].variant("eager").status == "ok"


@pytest.mark.parametrize(
    ("rounds", "launches", "shares"), [(20, 2, (10, 10)), (7, 3, (3, 2, 2)), (1, 2, (1,))]
)
def test_the_rounds_are_shared_out_among_the_launches(rounds, launches, shares):
    plan = Suite(Case(""), (TINY,), parse_variants("eager"), rounds, launches)
    assert plan.rounds_of_launches == shares


@pytest.mark.usefixtures("local_workers")
def test_variants_of_all_models_are_prepared_at_once_before_any_turn():
    names = (TINY, "tests.benchmarks.tiny_models:random", TINY)
    plan = Suite(Case("", batch=2, size=8), names, parse_variants("a=eager,b=eager"), 2, 1, at_once=4)
    texts: list[str] = []
    done: list[int] = []

    def progress(text: str, units: int = 0) -> None:
        texts.append(text)
        done.append(units)

    first, random, last = run_suite(plan, progress)
    assert [variant.status for variant in random.variants] == ["failed", "failed"]
    for model in (first, last):
        assert [(variant.name, variant.status, len(variant.seconds)) for variant in model.variants] == [
            ("a", "ok", 2),
            ("b", "ok", 2),
        ]
    turns = [number for number, text in enumerate(texts) if "in turns" in text]
    assert len(turns) == 4
    assert turns == list(range(len(texts) - 4, len(texts)))
    assert sum(done) == plan.units_of_work


@pytest.mark.usefixtures("local_workers")
def test_every_launch_measures_and_the_second_compiles_with_warm_caches():
    report, _ = measure((TINY,), "eager,fxpasses:inner=eager")
    (model,) = report.models
    assert model.launches == (1, 1)
    assert [len(variant.seconds) for variant in model.variants] == [2, 2]
    compiled = model.variant("fxpasses:inner=eager")
    assert compiled.compile_seconds_cold is not None
    assert compiled.compile_seconds_warm is not None
    assert model.variant("eager").compile_seconds_warm is None


@pytest.mark.usefixtures("local_workers")
def test_compilations_are_repeated_and_their_medians_reported(monkeypatch):
    asked: list[Path] = []
    seconds = iter([5.0, 1.0, 7.0, 3.0])  # cold and warm, twice; launches take next to nothing
    prepare = Server._prepare

    def timed(self, request):
        reply = prepare(self, request)
        again = request.extent == "compilation" and reply.compile_seconds is not None
        return replace(reply, compile_seconds=next(seconds)) if again else reply

    monkeypatch.setattr(Server, "_prepare", timed)
    worker = suite._worker
    monkeypatch.setattr(suite, "_worker", lambda plan, cache: asked.append(cache) or worker(plan, cache))
    plan = Suite(
        Case("", batch=2, size=8), (TINY,), parse_variants("eager,fxpasses:inner=eager"), 2, compilations=3
    )
    done: list[int] = []
    (model,) = run_suite(plan, lambda text, units=0: done.append(units))
    assert sum(done) == plan.units_of_work
    compiled = model.variant("fxpasses:inner=eager")
    assert (compiled.compile_seconds_cold, compiled.compile_seconds_warm) == (5.0, 1.0)
    assert model.variant("eager").compile_seconds_cold is None
    again = [path for path in asked if "again" in path.name]
    assert [again.count(path) for path in dict.fromkeys(again)] == [2] * 4  # a cold one, and one after it


@pytest.mark.usefixtures("local_workers")
def test_a_variant_that_goes_wrong_in_a_later_launch_keeps_no_time(monkeypatch):
    prepare, calls = suite._prepare, []

    def wrong_later(plan, case, variant, reference, worker):
        calls.append(variant.name)
        result = prepare(plan, case, variant, reference, worker)
        late = calls.count(variant.name) == 2 and variant.name == "b"
        return replace(result, status="wrong", message="nan") if late else result

    monkeypatch.setattr(suite, "_prepare", wrong_later)
    report, _ = measure((TINY,), "a=eager,b=eager")
    assert (report.models[0].variant("b").status, report.models[0].variant("b").seconds) == ("wrong", ())
    assert "a later launch: nan" in str(report.models[0].variant("b").message)
    assert len(report.models[0].seconds("a")) == 2


@pytest.mark.usefixtures("local_workers")
def test_saved_bytes_alone_need_no_time_and_no_reference():
    plan = Suite(
        Case("", mode="frozen-training", batch=2, size=8),
        (TINY,),
        parse_variants("eager,fxpasses:inner=aot_eager;profit=always"),
        only_saved_bytes=True,
    )
    (result,) = run_suite(plan, lambda text, done=0: None)
    assert [variant.seconds for variant in result.variants] == [(), ()]
    # Folded, a convolution's output need not be saved: that is what the rewrite is for.
    assert result.saved_bytes_ratio("fxpasses:inner=aot_eager;profit=always", "eager") < 1


@pytest.mark.usefixtures("local_workers")
def test_a_table_and_a_plot_are_made_of_any_report(tmp_path):
    report, _ = measure((WRONG, TINY), "eager,fxpasses:inner=eager", mode="frozen-training")
    console = Console(record=True, width=200)
    print_report(report, console)
    text = console.export_text()
    assert "inconclusive" in text
    assert "wrong: " in text
    plot_report(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.models", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )


def assert_a_whole_run_is_right(status: int, printed: str, written: Path, compiler: str) -> None:
    assert status == 1
    assert f"PASS min({compiler}/eager) > 0" in printed
    assert "FAIL min(openvino/eager) >= 1: no figure (variant 'openvino' was not run" in printed
    report = load_report(written / "run.json")
    assert report.baseline == ("inductor" if compiler == "inductor" else "eager")
    (model,) = report.models
    assert [(variant.name, variant.status, len(variant.seconds)) for variant in model.variants] == [
        ("eager", "ok", 3),
        (compiler, "ok", 3),
    ]
    assert model.variant(compiler).compile_seconds_cold is not None
    assert model.ratio("eager", compiler).verdict == "inconclusive"  # of three rounds nothing is claimed
    assert [gate.passed for gate in report.gates] == [True, False]
    assert json.loads((written / "run.json").read_text())["schema"] == 1
    with (written / "run.csv").open() as file:
        assert [row["variant"] for row in csv.DictReader(file)] == ["eager", compiler]


def arguments_of_a_whole_run(written: Path, compiler: str) -> list[str]:
    return [
        *("--models", TINY, "--variants", f"eager,{compiler}", "--size", "16", "--rounds", "3", "--no-warm"),
        *("--threads", "1", "--json", str(written / "run.json"), "--csv", str(written / "run.csv")),
        *("--require", f"min({compiler}/eager) > 0", "--require", "min(openvino/eager) >= 1"),
    ]


@pytest.mark.usefixtures("local_workers")
def test_a_run_writes_its_files_and_fails_on_its_failing_gate(tmp_path, capsys):
    compiler = "fxpasses:inner=eager"
    status = models.main(arguments_of_a_whole_run(tmp_path, compiler))
    assert_a_whole_run_is_right(status, capsys.readouterr().out, tmp_path, compiler)


@pytest.mark.full
@pytest.mark.timed
def test_a_run_in_processes_writes_its_files_and_fails_on_its_failing_gate(tmp_path):
    done = command(*arguments_of_a_whole_run(tmp_path, "inductor"))
    assert_a_whole_run_is_right(done.returncode, done.stdout, tmp_path, "inductor")


@pytest.mark.usefixtures("local_workers")
def test_a_model_that_does_not_exist_is_found_before_anything_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(models, "run_suite", None)
    with pytest.raises(SystemExit, match="2"):
        models.main(["--models", f"{TINY},tests.benchmarks.tiny_models:huge", "--variants", "eager"])
    told = capsys.readouterr()
    assert "huge" in told.err
    assert told.out == ""


@pytest.mark.full
@pytest.mark.timed
def test_the_same_variant_twice_is_inconclusive_or_within_three_percent(tmp_path):
    """Tests of the method, not of a speed: no time is asserted, only that equal things compare as equal."""
    path = tmp_path / "run.json"
    result = command("--variants", "a=inductor,b=inductor", *SELF_TEST, "--json", str(path))
    assert result.returncode == 0, result.stderr
    ratio = load_report(path).models[0].ratio("a", "b")
    assert ratio.verdict == "inconclusive" or abs(ratio.value - 1) <= 0.03


@pytest.mark.full
@pytest.mark.timed
def test_a_variant_slowed_by_a_tenth_is_found(tmp_path):
    """Tests of the method, not of a speed: the slowdown is a factor of the call's own time."""
    path = tmp_path / "run.json"
    variants = "inductor,slow=slowed(1.1):inductor"
    result = command("--variants", variants, *SELF_TEST, "--json", str(path))
    assert result.returncode == 0, result.stderr
    ratio = load_report(path).models[0].ratio("slow", "inductor")
    assert ratio.high is not None
    assert ratio.high < 1
