"""Workers: turns that are fair, failures that are told, results that are checked before they are timed."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from benchmarks.models.accuracy import Reference, judge, make_reference
from benchmarks.models.cases import Case, CaseError
from benchmarks.models.messages import CheckModels, MakeReference, Prepare, Prepared, TimeSteps
from benchmarks.models.saved_tensors import saved_bytes
from benchmarks.models.variants import VariantError, parse_variant
from benchmarks.models.worker import Server
from benchmarks.models.workers import Worker, WorkerError, time_in_rounds

TINY = "tests.benchmarks.tiny_models:"


class Clockwork:
    """A worker that answers turns with a constant, and fails from a given turn on."""

    def __init__(self, name: str, diary: list[str], seconds: float, fails_after: int | None = None) -> None:
        self.name, self.diary, self.seconds, self.left = name, diary, seconds, fails_after

    def request(self, message: object) -> float:
        assert isinstance(message, TimeSteps)
        if self.left == 0:
            raise WorkerError("out of memory")
        self.left = None if self.left is None else self.left - 1
        self.diary.append(self.name)
        return self.seconds


def test_every_worker_takes_one_turn_a_round_in_an_order_that_changes():
    diary: list[str] = []
    rounds = []
    workers = {name: Clockwork(name, diary, 1.0) for name in "abc"}
    seconds, failures = time_in_rounds(
        workers, TimeSteps(), 30, after_round=lambda: rounds.append(len(diary))
    )
    orders = Counter(tuple(diary[start : start + 3]) for start in range(0, 90, 3))
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len(orders) == 6
    assert seconds == {name: [1.0] * 30 for name in "abc"}
    assert failures == {}
    assert rounds == list(range(3, 91, 3))


def test_the_order_depends_on_the_seed_alone():
    diaries: list[list[str]] = [[], [], []]
    for diary, seed in zip(diaries, (0, 0, 1), strict=True):
        time_in_rounds({name: Clockwork(name, diary, 1.0) for name in "abcd"}, TimeSteps(), 8, seed=seed)
    assert diaries[0] == diaries[1] != diaries[2]


def test_a_worker_that_fails_leaves_no_times_and_the_others_go_on():
    diary: list[str] = []
    workers = {"good": Clockwork("good", diary, 1.0), "bad": Clockwork("bad", diary, 2.0, fails_after=2)}
    seconds, failures = time_in_rounds(workers, TimeSteps(), 5)
    assert seconds == {"good": [1.0] * 5}
    assert failures == {"bad": "out of memory"}


def test_a_process_answers_and_reports_what_went_wrong(tmp_path):
    with Worker(threads=1, cache=tmp_path) as worker:
        assert worker.request(CheckModels((f"{TINY}tiny",))) is None
        with pytest.raises(WorkerError, match="tinny") as caught:
            worker.request(CheckModels((f"{TINY}tinny",)))
        assert caught.value.kind == "ModelSpecError"
        assert worker.request(CheckModels((f"{TINY}tiny",))) is None


def test_a_process_that_dies_says_how_and_its_last_words(tmp_path):
    prepare = Prepare(
        Case(f"{TINY}dies_when_compiled", size=8), parse_variant("fxpasses:inner=eager"), reference=None
    )
    with (
        Worker(threads=1, cache=tmp_path) as worker,
        pytest.raises(WorkerError, match=r"exit status 7: .*the compiler ran out of luck"),
    ):
        worker.request(prepare)


def test_a_process_that_does_not_answer_in_time_is_ended(tmp_path):
    with (
        Worker(threads=1, cache=tmp_path, request_seconds=0.0) as worker,
        pytest.raises(WorkerError, match="no answer within"),
    ):
        worker.request(CheckModels((f"{TINY}tiny",)))


def prepare(case: Case, variant: str, tmp_path) -> tuple[Server, Prepared]:
    """The server of a variant in this process, with its reference checked."""
    server = Server()
    path = str(tmp_path / "reference.pt")
    server.answer(MakeReference(case, path))
    reply = server.answer(Prepare(case, parse_variant(variant), path))
    assert isinstance(reply, Prepared)
    return server, reply


@pytest.mark.parametrize("mode", ["inference", "frozen-training", "training"])
@pytest.mark.parametrize("variant", ["eager", "fxpasses:inner=eager"])
def test_a_right_variant_is_ready_for_its_turn(mode, variant, tmp_path):
    case = Case(f"{TINY}tiny", mode=mode, batch=4, size=8)
    server, reply = prepare(case, variant, tmp_path)
    assert reply.accuracy is not None
    assert reply.accuracy.wrong is None
    assert (reply.compile_seconds is None) == (variant == "eager")
    assert (reply.saved_bytes is not None) == (mode != "inference")
    assert reply.calls >= 1
    assert server.answer(TimeSteps()) > 0


def test_a_rewrite_is_counted_by_its_name(tmp_path):
    case = Case(f"{TINY}tiny", mode="frozen-training", batch=4, size=8)
    _, reply = prepare(case, "fxpasses:inner=eager;profit=always", tmp_path)
    assert reply.rules["efficient_conv_bn_eval"] == 2


@pytest.mark.parametrize(
    ("model", "mode", "what"),
    [
        ("wrong_when_compiled", "inference", "output 0"),
        ("wrong_when_compiled", "training", "loss: error"),
        ("wrong_gradient_when_compiled", "frozen-training", "gradient of first.weight"),
    ],
)
def test_a_wrong_variant_is_found_and_takes_no_turn(model, mode, what, tmp_path):
    server, reply = prepare(
        Case(f"{TINY}{model}", mode=mode, batch=4, size=8), "fxpasses:inner=eager", tmp_path
    )
    assert reply.accuracy is not None
    assert reply.accuracy.wrong is not None
    assert what in reply.accuracy.wrong
    with pytest.raises(RuntimeError, match="before a variant was prepared"):
        server.answer(TimeSteps())


def test_a_model_that_draws_random_numbers_is_refused(tmp_path):
    with pytest.raises(CaseError, match="random numbers"):
        Server().answer(MakeReference(Case(f"{TINY}random", size=8), str(tmp_path / "reference.pt")))


def test_an_error_just_within_tolerance_is_right_and_just_beyond_is_wrong():
    case = Case(f"{TINY}tiny", mode="frozen-training", batch=2, size=8)
    reference = make_reference(case)
    peak = reference.values["output 0"].abs().max()
    for factor, wrong in ((0.9, False), (1.1, True)):
        values = dict(reference.values)
        off = values["output 0"].clone()
        off.view(-1)[0] += factor * 1e-5 * peak
        accuracy = judge(case, values | {"output 0": off}, reference.gradients, reference)
        assert reference.value_error < 5e-6, "the floor, not eager's error, is what this test is about"
        assert (accuracy.wrong is not None) is wrong


def test_a_missing_gradient_and_a_missing_output_are_wrong():
    case = Case(f"{TINY}tiny", mode="frozen-training", batch=2, size=8)
    reference = make_reference(case)
    fewer = {name: gradient for name, gradient in reference.gradients.items() if name != "classifier.bias"}
    assert "classifier.bias" in str(judge(case, reference.values, fewer, reference).wrong)
    assert "output 0" in str(judge(case, {}, reference.gradients, reference).wrong)
    assert judge(case, reference.values, reference.gradients, reference).wrong is None


def test_a_reference_survives_its_file(tmp_path):
    reference = make_reference(Case(f"{TINY}tiny", mode="training", batch=2, size=8))
    reference.save(tmp_path / "reference.pt")
    loaded = Reference.load(tmp_path / "reference.pt")
    assert loaded.value_error == reference.value_error
    assert all(
        torch.equal(loaded.gradients[name], gradient) for name, gradient in reference.gradients.items()
    )
    assert "buffer first_norm.running_mean" in loaded.values


def test_saved_bytes_count_a_storage_once_and_leave_out_what_lives_anyway():
    weight, images = torch.randn(16, 16, requires_grad=True), torch.randn(16, 16)
    hidden = images @ weight  # saves images, which is an input
    outputs = hidden.exp()  # saves its result
    total = outputs @ weight + outputs.t() @ weight  # save the same storage twice more, and a parameter
    assert saved_bytes([total], [weight, images]) == 16 * 16 * 4
    assert saved_bytes([total], [weight]) == 2 * 16 * 16 * 4
    assert saved_bytes([hidden.detach()], []) == 0


def test_saved_bytes_see_what_a_function_keeps_as_an_attribute():
    class Keeps(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor):
            ctx.save_for_backward(tensor.exp())
            ctx.kept = [torch.ones(32)]
            return tensor * 2

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    leaf = torch.randn(8, requires_grad=True)
    assert saved_bytes([Keeps.apply(leaf)], [leaf]) == 8 * 4 + 32 * 4


def test_saved_bytes_of_a_compiled_function_are_those_that_its_backward_needs():
    first, second = (nn.Linear(16, 16, bias=False) for _ in range(2))
    images = torch.randn(4, 16)
    compiled = torch.compile(lambda value: second(first(value)), backend="aot_eager")
    outputs = compiled(images)
    # The backward of the second layer needs the first one's output; that of the first the input.
    assert saved_bytes([outputs], [first.weight, second.weight, images]) == 4 * 16 * 4


@pytest.mark.full
def test_saved_bytes_of_resnet18_are_what_was_measured_independently(tmp_path):
    """148 MiB with inductor's conv-BN flag at batch 8: from the partitioned graphs, not from this walk."""
    case = Case("resnet18", mode="frozen-training", batch=8, size=224, threads=2)
    with Worker(threads=2, cache=tmp_path) as worker:
        reply = worker.request(Prepare(case, parse_variant("inductor-convbn"), None, "saved bytes"))
    assert isinstance(reply, Prepared)
    assert reply.saved_bytes is not None
    assert reply.saved_bytes / 2**20 == pytest.approx(148, abs=0.5)


def test_a_variant_in_bfloat16_is_judged_by_eagers_error_under_autocast():
    case = Case(f"{TINY}tiny", batch=2, size=8)
    reference = make_reference(case)
    values = {name: value.bfloat16().float() for name, value in reference.values.items()}
    assert judge(case, values, {}, reference).wrong is not None
    accuracy = judge(case, values, {}, reference, "bfloat16")
    assert accuracy.wrong is None
    assert 1e-2 <= accuracy.value_tolerance < 0.1
    wrong = {name: 1.5 * value for name, value in values.items()}
    assert judge(case, wrong, {}, reference, "bfloat16").wrong is not None


def test_a_precision_is_a_field_of_a_variant_for_inference_in_float32():
    variant = parse_variant("fxpasses:weights=cached;precision=bfloat16")
    assert variant.precision == "bfloat16"
    variant.check(Case(f"{TINY}tiny"))
    for case in (Case(f"{TINY}tiny", mode="frozen-training"), Case(f"{TINY}tiny", dtype="float16")):
        with pytest.raises(VariantError, match="inference"):
            variant.check(case)
