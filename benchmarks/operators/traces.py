"""Chrome traces of the operator benchmark: one file an operator, in a folder.

The times of the rows are taken without a profiler. Once those of an input are there, everything that was
timed is called some more times under it, inside labelled ranges:

    input 0: resnet18_training.txt:7  >  repetition 0  >  inductor
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, record_function

from benchmarks.operators.inputs.log import Sample
from benchmarks.operators.runs import Observe
from fxpasses.errors import FxpassesError


class TraceFolderError(FxpassesError, ValueError):
    """A folder that traces cannot be written to."""


@dataclass(frozen=True)
class OperatorTraces:
    """Where traces are written, the device, and how often everything is called for them."""

    folder: Path
    device: torch.device
    repetitions: int

    def make_folder(self) -> None:
        """Makes the folder, unless it is there.

        Raises:
            TraceFolderError: it cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror
            message = f"{self.folder} cannot hold traces ({reason}); name another folder by --profile."
            raise TraceFolderError(message) from error

    @contextlib.contextmanager
    def of(self, operator: str) -> Iterator[Observe]:
        """What runs an input's functions under the profiler; at the end the operator's trace is written.

        An operator of which nothing was run has no trace.
        """
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        profiler = torch.profiler.profile(activities=activities)
        seen = 0

        def observe(sample: Sample, functions: Mapping[str, Callable[[], object]]) -> None:
            nonlocal seen
            if seen:
                profiler.toggle_collection_dynamic(True, activities)
            else:
                profiler.start()
            with record_function(f"input {seen}: {sample.source}"):
                self._repeat(functions)
            seen += 1
            # Off while the next input is compiled and timed.
            profiler.toggle_collection_dynamic(False, activities)

        try:
            yield observe
        finally:
            if seen:
                profiler.stop()
                profiler.export_chrome_trace(str(self.folder / f"{operator}.json"))

    def _repeat(self, functions: Mapping[str, Callable[[], object]]) -> None:
        for repetition in range(self.repetitions):
            with record_function(f"repetition {repetition}"):
                for name, function in functions.items():
                    with record_function(name):
                        function()
                        if self.device.type == "cuda":
                            torch.cuda.synchronize(self.device)
