"""What each part is worth, as Markdown: a table for each mode of every file of `benchmarks.ablation`."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.models.reporting import describe_settings
from benchmarks.models.results import Report
from benchmarks.models.worth import Comparison, Worth, is_ablation, load_ablation, uncounted, worths
from benchmarks.pages.markdown import format_ratio, table_row

_HEAD = """## What each part is worth

Generated of the results of `python -m benchmarks.ablation`: the time of fxpasses without a part over its time
with it, beside the others and alone, as geometric means over the models in which it was applied; above 1 it
pays. Bytes are by how much it lessens what is kept for the backward, in all these models together."""


def ablation_section(results: Path) -> str:
    """The tables, with a heading; an empty text where there is no such file under `results`.

    Raises:
        ResultsError: a file of this kind has another schema.
    """
    tables = []
    for path in sorted(results.rglob("*.json")):
        if not _is_ablation(path):
            continue
        ablation = load_ablation(path)
        source = path.resolve().relative_to(results.resolve().parent.parent).as_posix()
        environment = ablation.environment
        where = f"{environment.get('device')}, {str(environment.get('date'))[:10]}; `{source}`"
        tables += [_table(mode, report, where) for mode, report in ablation.reports.items()]
    return "\n\n".join([_HEAD, *tables]) if tables else ""


def _is_ablation(path: Path) -> bool:
    try:
        return is_ablation(json.loads(path.read_text(encoding="utf-8")))
    except ValueError:
        return False  # whose table it is says that it cannot be read


def _table(mode: str, report: Report, where: str) -> str:
    trains = report.settings.get("mode") != "inference"
    columns = ["part", "applied", "models", "beside the others", "alone"]
    columns += ["saves beside", "saves alone"] if trains else []
    names = ", ".join(model.model for model in report.models)
    lines = [
        f"**{mode}**: {describe_settings(report)}; {names} ({where})",
        "",
        table_row(columns),
        table_row(["---"] * len(columns)),
        *(table_row(_cells(worth, trains=trains)) for worth in worths(report)),
    ]
    if others := uncounted(report):
        counts = ", ".join(f"`{name}` {count}" for name, count in others.items())
        lines += ["", f"Applied too, and no option leaves it out by itself: {counts}."]
    return "\n".join(lines)


def _cells(worth: Worth, *, trains: bool) -> list[str]:
    compared = (worth.beside, worth.alone)
    applied = "always" if worth.applied is None else str(worth.applied)
    cells = [f"`{worth.part.name}`", applied, str(len(worth.beside.models))]
    cells += ["-" if comparison.ratio is None else format_ratio(comparison.ratio) for comparison in compared]
    return cells + [_mebibytes(comparison) for comparison in compared] if trains else cells


def _mebibytes(comparison: Comparison) -> str:
    return "-" if comparison.saved_bytes is None else f"{comparison.saved_bytes / 2**20:.0f} MiB"
