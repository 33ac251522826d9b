"""The layout plan: what was decided, what it is predicted to cost, and why, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from fxpasses.graph.layouts import Label

DECISIONS = {
    "applied": "carried out",
    "failed": "not carried out: the graph could not be changed so, and is as it was",
    "no-gain": "nothing to do: no tensor gains by another layout",
    "as-stock": (
        "as without a plan: what one is predicted to gain over that is less than what the prediction may be "
        "off"
    ),
    "no-profile": (
        "not carried out: this device has not been measured, and a roofline does not justify a change; "
        "compiling measures it, unless tune_seconds is 0, and so does `fxpasses tune`"
    ),
    "not-measured": (
        "not carried out: fewer than half of the convolutions have been measured on this device; compiling "
        "measures them, unless tune_seconds is 0, and so does `fxpasses tune`"
    ),
}
"""What may come of a plan, in words."""


@dataclass(frozen=True)
class CutEdge:
    """A tensor that is needed in another layout than it is made in.

    Attributes:
        tensor: the node that makes it.
        operator: its operator, or ``"placeholder"``.
        size: its sizes, at the hints.
        made: the label that it is made in.
        seconds: the predicted cost of its one copy.
        wanted_by: the nodes that read the copy, with their operators.
        kept_by: the nodes that read it as it is made.
        location: the user's source line, where known.
        node: the tensor's name in the graph; `tensor` is the user's, where that is another.
        made_for: the nearest operators that want it as it is made, each with its reason.
        wanted_for: the nearest ones that want the copy, past readers that take either.
        cause: for whose sake it is copied, as `LayoutPlan.causes` has it.
        forcing: the node that forces the copy; empty where it is no operator.
    """

    tensor: str
    operator: str
    size: tuple[int, ...]
    made: Label
    seconds: float
    wanted_by: tuple[str, ...]
    kept_by: tuple[str, ...]
    location: str = ""
    node: str = ""
    made_for: tuple[str, ...] = ()
    wanted_for: tuple[str, ...] = ()
    cause: str = ""
    forcing: str = ""

    @property
    def readers(self) -> tuple[str, ...]:
        """The names of the nodes that read the copy."""
        return tuple(reader.partition(" ")[0] for reader in self.wanted_by)

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.size))
        other = "channels_last" if self.made == "contiguous" else "contiguous"
        kept = (
            f"; {_few(self.kept_by)} read{'s' * (len(self.kept_by) == 1)} it as it is" if self.kept_by else ""
        )
        where = f" at {self.location}" if self.location else ""
        return (
            f"{self.tensor} ({self.operator}, {sizes}{where}) is made {self.made} and copied to {other} "
            f"in {self.seconds * 1e6:.1f} us for {_few(self.wanted_by)}{kept}"
            f"{_because(self.made, self.made_for)}{_because(other, self.wanted_for)}"
        )


@dataclass(frozen=True)
class ConvolutionPlan:
    """One convolution: its label, and what it is predicted to take under each.

    Attributes:
        node: the convolution, or the gradients of one.
        label: what the plan gives it.
        implementation: what computes it there.
        contiguous, channels_last: predicted seconds under each label.
        measured: whether a device profile says so, and not the roofline.
        predicted: whether it follows from measurements of convolutions that resemble it.
        flops: its multiplications and additions, at the hints; 0 where nobody counted.
    """

    node: str
    label: Label
    implementation: str
    contiguous: float
    channels_last: float
    measured: bool = False
    predicted: bool = False
    flops: float = 0.0


@dataclass(frozen=True)
class Flip:
    """The plan at other sizes than the ones it was made at.

    Attributes:
        sizes: the values of the size symbols.
        optimal: whether the plan is still of least cost there.
        seconds, least: the plan's predicted cost there, and the least one.
    """

    sizes: Mapping[str, int]
    optimal: bool
    seconds: float
    least: float


@dataclass(frozen=True)
class Tuning:
    """What was measured while the plan was made.

    Attributes:
        measured: how many rows the device's store gained.
        seconds: how long that took.
        in_doubt: how many operators the plan still depends on that were not measured.
    """

    measured: int
    seconds: float
    in_doubt: int


@dataclass(frozen=True)
class NearestFlip:
    """The convolution that comes nearest to changing the plan.

    Attributes:
        node: the convolution, or the gradients of one.
        slower: by which part of its predicted time it would have to be slower: 0.12 is 12 %.
    """

    node: str
    slower: float


@dataclass(frozen=True)
class StockPlan:
    """What stock inductor's layout optimisation would do with the same graph.

    Attributes:
        channels_last: its one decision: whether convolutions run channels-last.
        copies: how many inputs, weights and outputs it would copy for that at every call.
    """

    channels_last: bool
    copies: int


@dataclass(frozen=True)
class BoundaryTensor:
    """An image that a graph takes or gives.

    Attributes:
        name: what it is called.
        kind: whether it is an input, other than a parameter, or a result.
        label: its layout.
        eager: the layout that it has in eager mode; of an input the one that it comes in.
    """

    name: str
    kind: Literal["input", "result"]
    label: Label
    eager: Label


@dataclass(frozen=True)
class LayoutPlan:
    """One label for each tensor, and what that is predicted to cost against the two uniform plans.

    Attributes:
        labels: of every tensor that can have one, by node name.
        convolutions: every convolution.
        cut_edges: the tensors that are copied.
        seconds: predicted cost of this plan: convolutions, operators that move data, and copies.
        contiguous_seconds, channels_last_seconds: the same of the two uniform plans.
        converted: how many tensors have another label than in the traced graph.
        weights: of every convolution weight that is an input of the graph, the label it is wanted in, by the
            parameter's name with underscores for dots (``layer1_0_weight``) where that is known.
        forced_by_unknown: operators that the taxonomy does not know and for which a tensor is copied.
        sizes: for dynamic shapes, whether the plan stays optimal at the corners of the range.
        decision: what came of the plan, a key of `DECISIONS`.
        source: where the costs come from: a device profile's name, or ``"roofline"``.
        copies: how many copies were put into the graph.
        repairs: how many of them because an operator did not follow the layout of what it reads.
        planning_seconds: how long reading and solving took.
        tuning: what was measured for it; None where nothing was to be measured.
        otherwise_seconds: predicted cost of what would be done without a plan: stock inductor's layouts, or
            those of the traced graph; None where that was not asked.
        uncertainty: how many seconds the difference between the two may be off.
        foregone: how many seconds the best plan was predicted to gain, where it was not sure enough.
        nearest_flip: what would change the plan first.
        stock: what stock inductor would have done; None where the graph does not go to inductor.
        boundary: the images that the graph takes and gives.
        causes: how many copies there are, or would be, for whose sake: ``"inputs"`` that come so,
            ``"weights"``, ``"results"`` and ``"gradients"`` that have eager's strides, an operator that
            forces (``"aten.view"``), ``"costs"`` where each side is cheaper so, and ``"repairs"``.
        forcing: how many copies each operator that forces causes, by node name.
    """

    labels: Mapping[str, Label]
    convolutions: tuple[ConvolutionPlan, ...]
    cut_edges: tuple[CutEdge, ...]
    seconds: float
    contiguous_seconds: float
    channels_last_seconds: float
    converted: int
    weights: Mapping[str, Label] = field(default_factory=dict)
    forced_by_unknown: tuple[str, ...] = ()
    sizes: tuple[Flip, ...] = ()
    decision: str = "applied"
    source: str = "roofline"
    copies: int = 0
    repairs: int = 0
    planning_seconds: float = 0.0
    tuning: Tuning | None = None
    otherwise_seconds: float | None = None
    uncertainty: float = 0.0
    foregone: float = 0.0
    nearest_flip: NearestFlip | None = None
    stock: StockPlan | None = None
    boundary: tuple[BoundaryTensor, ...] = ()
    causes: Mapping[str, int] = field(default_factory=dict)
    forcing: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_contiguous(self) -> bool:
        """Whether nothing is converted."""
        return self.converted == 0

    @property
    def is_in_force(self) -> bool:
        """Whether it says what is done: by itself, by inductor, or because nothing is to be done."""
        return self.decision in ("applied", "as-stock", "no-gain")

    @property
    def measured(self) -> int:
        """Of how many convolutions the costs were measured."""
        return sum(convolution.measured for convolution in self.convolutions)

    @property
    def predicted(self) -> int:
        """Of how many convolutions the costs follow from measurements of others."""
        return sum(convolution.predicted for convolution in self.convolutions)

    @property
    def measured_share(self) -> float | None:
        """Which part of all FLOPs of convolutions those have that were measured; None where not counted."""
        total = sum(convolution.flops for convolution in self.convolutions)
        known = sum(convolution.flops for convolution in self.convolutions if convolution.measured)
        return known / total if total else None

    @property
    def seconds_of_convolutions(self) -> float | None:
        """What convolutions and copies are predicted to take; None where one is a guess by the roofline."""
        if not self.convolutions or self.measured + self.predicted < len(self.convolutions):
            return None
        copied = sum(edge.seconds for edge in self.cut_edges)
        return copied + sum(
            each.contiguous if each.label == "contiguous" else each.channels_last
            for each in self.convolutions
        )

    @property
    def gain(self) -> float:
        """How many seconds a call is predicted to gain over what would be done without a plan."""
        return 0.0 if self.otherwise_seconds is None else self.otherwise_seconds - self.seconds

    @property
    def copies_avoided(self) -> int | None:
        """How many copies fewer than stock inductor's (or more, below 0); None where it is not compared."""
        return self.stock.copies - (self.copies or len(self.cut_edges)) if self.stock is not None else None

    def not_carried_out(self, decision: str) -> LayoutPlan:
        """The plan of a graph that is left as it is."""
        boundary = tuple(replace(each, label=each.eager) for each in self.boundary)
        return replace(self, decision=decision, boundary=boundary)

    def to_dict(self) -> dict[str, Any]:
        """The plan as what JSON knows."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> LayoutPlan:
        """The plan that `to_dict` wrote, also after a trip through JSON.

        Raises:
            KeyError, TypeError: the data is no plan.
        """
        edges: list[dict[str, Any]] = [
            {key: tuple(value) if isinstance(value, list) else value for key, value in edge.items()}
            for edge in data["cut_edges"]
        ]
        nested = {
            "convolutions": tuple(ConvolutionPlan(**fields) for fields in data["convolutions"]),
            "cut_edges": tuple(CutEdge(**edge) for edge in edges),
            "sizes": tuple(Flip(**fields) for fields in data["sizes"]),
            "forced_by_unknown": tuple(data["forced_by_unknown"]),
            "stock": StockPlan(**data["stock"]) if data["stock"] is not None else None,
            "tuning": Tuning(**data["tuning"]) if data["tuning"] is not None else None,
            "nearest_flip": NearestFlip(**data["nearest_flip"]) if data["nearest_flip"] is not None else None,
            "boundary": tuple(BoundaryTensor(**fields) for fields in data.get("boundary", ())),
        }
        return LayoutPlan(**{**data, **nested})

    def __str__(self) -> str:
        predicted = (self.seconds, self.contiguous_seconds, self.channels_last_seconds)
        ours, contiguous, channels_last = (f"{seconds * 1e3:.3f} ms" for seconds in predicted)
        lines = [
            f"layout plan ({self.source}): {ours}",
            f"decision: {DECISIONS[self.decision]}",
            f"all contiguous: {contiguous}; all channels_last: {channels_last}",
            f"{self.converted} of {len(self.labels)} tensors converted, {len(self.cut_edges)} copied:",
            *(f"  {edge}" for edge in self.cut_edges),
        ]
        if self.stock is not None:
            lines.append(against_stock(self))
        lines += how_sure(self)
        if self.forced_by_unknown:
            lines.append(f"operators of unknown semantics forced copies: {', '.join(self.forced_by_unknown)}")
        for flip in self.sizes:
            if not flip.optimal:
                lines.append(
                    f"not optimal at {dict(flip.sizes)}: {flip.seconds:.3g} s against {flip.least:.3g} s"
                )
        return "\n".join(lines)


def how_sure(plan: LayoutPlan) -> list[str]:
    """What was measured for a plan and in how long, what was predicted, and by how much it wins, in words."""
    lines = []
    count = len(plan.convolutions)
    if plan.tuning is not None:
        rest = f", {plan.tuning.in_doubt} still in doubt" if plan.tuning.in_doubt else ""
        lines.append(f"{plan.tuning.measured} measurements in {plan.tuning.seconds:.1f} s{rest}")
    lines.append(f"of {count} convolutions {plan.measured} measured, {plan.predicted} predicted from others")
    if plan.otherwise_seconds is not None:
        unsure = f" ± {plan.uncertainty * 1e3:.3f}" if plan.uncertainty else ""
        what, gain = ("would gain", plan.foregone) if plan.decision == "as-stock" else ("gains", plan.gain)
        lines.append(f"{what} {gain * 1e3:.3f}{unsure} ms of {plan.otherwise_seconds * 1e3:.3f} ms")
    if plan.nearest_flip is not None:
        flip = plan.nearest_flip
        lines.append(f"another plan would win if {flip.node} were {flip.slower:.0%} slower than that")
    return lines


def against_stock(plan: LayoutPlan) -> str:
    """Stock inductor's decision and copies, and how many of these the plan spares, in words."""
    if plan.stock is None or plan.copies_avoided is None:
        return "not compared with stock inductor"
    decision = "channels_last throughout" if plan.stock.channels_last else "contiguous throughout"
    spared = plan.copies_avoided
    return f"stock inductor: {decision}, {plan.stock.copies} copies; {abs(spared)} " + (
        "fewer here" if spared >= 0 else "more here"
    )


def _because(label: str, reasons: tuple[str, ...]) -> str:
    return f"; {label}: {', '.join(reasons)}" if reasons else ""


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
