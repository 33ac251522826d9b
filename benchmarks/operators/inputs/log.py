"""Operator logs: which operators a model calls, with which inputs, and how often.

The format is that of PyTorch's `operator_inp_logs`, one heading for each operator and one line for each
distinct input with its number of occurrences:

    Operator: aten.convolution.default
    cnt: 4, ((T([8, 64, 56, 56], f16), T([64, 64, 3, 3], f16), None, [1], [1], [1], False, [0], 1), {})

Files may be compressed by gzip (`.gz`). Blank lines and lines that begin with `#` are read over, but never
written, because PyTorch's loader knows neither.
"""

from __future__ import annotations

import gzip
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO, cast

import torch

from benchmarks.operators.inputs.notation import MAXIMUM_LINE, Call, NotationError, format_call, parse_call
from benchmarks.torch_internals import OpOverload
from fxpasses.errors import FxpassesError

RENAMED = {"aten.sum.SymInt": "aten.sum.dim_IntList"}
"""Names in the logs that PyTorch published in 2022, and what torch calls those operators now."""

_OPERATOR = re.compile(r"Operator:\s*([A-Za-z_]\w*(?:\.\w+){2})", re.ASCII)
_SAMPLE = re.compile(r"cnt:\s*([0-9]{1,18}),\s*(\S.*)", re.DOTALL)


class LogError(FxpassesError, ValueError):
    """A log that cannot be read; the message begins with the file and the line."""


@dataclass(frozen=True)
class Sample:
    """One distinct input of an operator, how often it occurred, and the file and line that say so."""

    call: Call
    count: int
    source: str

    @property
    def text(self) -> str:
        """The arguments in the notation of the log."""
        return format_call(self.call)


@dataclass
class OperatorLog:
    """Operators, by name, with their samples; every distinct input of an operator is there once."""

    operators: dict[str, dict[str, Sample]] = field(default_factory=dict)

    def add(self, operator: str, sample: Sample) -> None:
        """Adds the occurrences of `sample` to those already there."""
        samples = self.operators.setdefault(operator, {})
        known = samples.get(sample.text)
        if known is None:
            samples[sample.text] = sample
        else:
            samples[sample.text] = Sample(known.call, known.count + sample.count, known.source)

    def merge(self, other: OperatorLog) -> None:
        """Adds all occurrences of `other`."""
        for operator, samples in other.operators.items():
            for sample in samples.values():
                self.add(operator, sample)

    def names(self) -> list[str]:
        """The operators in alphabetical order."""
        return sorted(self.operators)

    def samples(self, operator: str) -> list[Sample]:
        """The inputs of `operator`, the most frequent first, equally frequent ones as they were read."""
        return sorted(self.operators.get(operator, {}).values(), key=lambda sample: -sample.count)


def read_log(path: Path) -> OperatorLog:
    """Reads one file.

    Raises:
        LogError: the file is missing or damaged, or a line is not what the format allows.
    """
    log, operator, number = OperatorLog(), "", 0
    try:
        with _open(path) as file:
            for number, line in enumerate(_lines(file), start=1):
                heading = _OPERATOR.fullmatch(line)
                if heading:
                    operator = RENAMED.get(heading[1], heading[1])
                elif line and not line.startswith("#"):
                    if not operator:
                        raise NotationError("expected 'Operator: namespace.name.overload' first")
                    log.add(operator, _sample(line, f"{path.name}:{number}"))
    except NotationError as error:
        raise LogError(f"{path}:{number}: {error}.") from None
    except (OSError, EOFError) as error:
        raise LogError(f"{path}:{number + 1}: the log cannot be read ({error}).") from error
    return log


def read_logs(paths: Iterable[Path]) -> OperatorLog:
    """Reads several files into one log.

    Raises:
        LogError: as `read_log`.
    """
    log = OperatorLog()
    for path in paths:
        log.merge(read_log(path))
    return log


def write_log(path: Path, counts: Mapping[str, Counter[str]]) -> None:
    """Writes a log: operators in alphabetical order, their inputs from the most to the least frequent.

    Args:
        path: the file to write; compressed where its name ends with `.gz`.
        counts: for each operator, how often each input occurred, the inputs in the notation of the log.
    """
    lines = []
    for operator in sorted(counts):
        lines.append(f"Operator: {operator}\n")
        for text, count in sorted(counts[operator].items(), key=lambda item: (-item[1], item[0])):
            lines.append(f"cnt: {count}, {text}\n")
    data = "".join(lines).encode()
    # Without a time stamp the same counts give the same file.
    path.write_bytes(gzip.compress(data, 9, mtime=0) if path.suffix == ".gz" else data)


def resolve_operator(name: str) -> OpOverload:
    """The operator that a log names, such as `aten.convolution.default`.

    Raises:
        LogError: this torch has no operator of that name.
    """
    namespace, _, rest = RENAMED.get(name, name).partition(".")
    packet, _, overload = rest.partition(".")
    try:
        operator = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    except (AttributeError, RuntimeError):
        operator = None
    if not isinstance(operator, OpOverload):
        raise LogError(f"torch {torch.__version__} has no operator {name!r}; write namespace.name.overload.")
    return operator


def _sample(line: str, source: str) -> Sample:
    match = _SAMPLE.fullmatch(line)
    if not match or int(match[1]) < 1:
        shown = line if len(line) <= 60 else f"{line[:57]}..."
        raise NotationError(f"expected 'cnt: N, (arguments, keywords)' or 'Operator: NAME', found {shown!r}")
    return Sample(parse_call(match[2].strip("'\"")), int(match[1]), source)


def _lines(file: TextIO) -> Iterator[str]:
    """The lines without their ends, none longer than the notation allows by more than a character."""
    while line := file.readline(MAXIMUM_LINE + 100):
        yield line.strip()


def _open(path: Path) -> TextIO:
    opener = gzip.open if path.suffix == ".gz" else open
    return cast(TextIO, opener(path, "rt", encoding="utf-8", errors="replace"))
