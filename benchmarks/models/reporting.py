"""Results for people: a table on the terminal, rows for a spreadsheet, a plot where looking beats reading."""

from __future__ import annotations

import csv
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.models.results import GateResult, ModelResult, NoFigureError, Report, VariantResult
from benchmarks.shared.statistics import Ratio

_CSV_FIELDS = (
    "model",
    "variant",
    "status",
    "median_seconds",
    "iqr_seconds",
    "n",
    "ratio",
    "ratio_low",
    "ratio_high",
    "verdict",
    "compile_seconds_cold",
    "compile_seconds_warm",
    "peak_bytes",
    "saved_bytes",
    "rules",
    "message",
)


def print_report(report: Report, console: Console) -> None:
    """A table for each model, the geometric means, and what is wrong or failed."""
    for model in report.models:
        console.print(_model_table(report, model))
        for variant in model.variants:
            if variant.status != "ok":
                console.print(
                    f"{escape(variant.name)}: [red]{variant.status}[/red]: {escape(variant.message or '')}"
                )
    if len(report.models) > 1 and any(
        variant.seconds for model in report.models for variant in model.variants
    ):
        console.print(_mean_table(report))


def print_gates(gates: tuple[GateResult, ...], console: Console) -> None:
    """One line a gate: PASS or FAIL, the figure with its interval, and the reason."""
    for gate in gates:
        verdict = "[green]PASS[/green]" if gate.passed else "[red]FAIL[/red]"
        figure = "no figure" if gate.figure is None else f"{gate.figure:.4f}"
        if gate.low is not None and gate.high is not None:
            figure += f" [{gate.low:.4f}, {gate.high:.4f}]"
        console.print(f"{verdict} {escape(gate.gate)}: {figure} ({escape(gate.reason)})", soft_wrap=True)


def write_csv(report: Report, path: Path) -> None:
    """One row for each model and variant; seconds, bytes and plain numbers."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _CSV_FIELDS)
        writer.writeheader()
        for model in report.models:
            for variant in model.variants:
                writer.writerow(_csv_row(report, model, variant))


def plot_report(report: Report, path: Path) -> None:
    """A PNG of the ratios to the baseline with their confidence intervals, a group for each model."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    timed = {variant.name for model in report.models for variant in model.variants if variant.seconds}
    names = [name for name in report.variant_names() if name in timed and name != report.baseline]
    figure, axes = plt.subplots(figsize=(max(6.0, 1.5 * len(report.models)), 4.5), layout="constrained")
    width = 0.8 / max(1, len(names))
    for column, name in enumerate(names):
        for row, model in enumerate(report.models):
            ratio = _ratio(model, name, report.baseline)
            if ratio is None:
                continue
            place = row + (column - (len(names) - 1) / 2) * width
            axes.plot([place], [ratio.value], "o", color=f"C{column}")
            if ratio.low is not None and ratio.high is not None:
                axes.plot([place, place], [ratio.low, ratio.high], "-", color=f"C{column}")
        axes.plot([], [], "o-", color=f"C{column}", label=name)
    axes.axhline(1.0, color="0.6", linewidth=1)
    axes.set_xticks(range(len(report.models)), [model.model for model in report.models], rotation=20)
    axes.set_ylabel(f"time of {report.baseline} / time of variant")
    axes.set_title(
        f"{describe_settings(report)}: above 1 is faster than {report.baseline}", fontsize="medium"
    )
    if names:
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)


def describe_settings(report: Report) -> str:
    """The case in words, such as ``inference, batch 1, 224, float32, cpu, 2 threads``."""
    settings = report.settings
    dynamic = "" if settings.get("dynamic") == "none" else f", dynamic {settings.get('dynamic')}"
    where = f"{settings.get('device')}, {settings.get('threads')} threads"
    shape = f"batch {settings.get('batch')}, size {settings.get('size')}"
    return f"{settings.get('mode')}, {shape}, {settings.get('dtype')}, {where}{dynamic}"


def format_ratio(ratio: Ratio | None) -> str:
    """The ratio with its interval and, where it says neither, "inconclusive"."""
    if ratio is None:
        return "-"
    if ratio.low is None or ratio.high is None:
        return f"{ratio.value:.3f} (n={ratio.n}, inconclusive)"
    note = " inconclusive" if ratio.verdict == "inconclusive" else ""
    return f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]{note}"


def _model_table(report: Report, model: ModelResult) -> Table:
    table = Table(title=f"{model.model}: {describe_settings(report)}", title_justify="left")
    table.add_column("variant", overflow="fold")
    headers = (
        "median ms",
        "IQR ms",
        "n",
        f"{report.baseline} / variant",
        "compile s cold (warm)",
        "peak MiB",
    )
    for header in headers:
        table.add_column(escape(header), justify="right")
    trains = report.settings.get("mode") != "inference"
    if trains:
        table.add_column("saved MiB", justify="right")
    table.add_column("rules", overflow="fold")
    for variant in model.variants:
        summary = variant.summary
        time = (
            ("-" if variant.status == "ok" else variant.status, "-", "-")
            if summary is None
            else _time_cells(summary.median, summary.iqr, summary.n)
        )
        is_baseline = variant.name == report.baseline
        ratio = "baseline" if is_baseline else format_ratio(_ratio(model, variant.name, report.baseline))
        cells = [*time, ratio, _compile_cell(variant), _mebibytes(variant.peak_bytes)]
        cells += [_mebibytes(variant.saved_bytes)] if trains else []
        table.add_row(*(escape(cell) for cell in (variant.name, *cells, _rules_cell(variant))))
    return table


def _mean_table(report: Report) -> Table:
    table = Table(title=f"geometric means over {len(report.models)} models", title_justify="left")
    table.add_column("variant", overflow="fold")
    table.add_column(escape(f"{report.baseline} / variant"), justify="right")
    for name in report.variant_names():
        if name == report.baseline:
            continue
        try:
            cell = format_ratio(report.geometric_mean(name, report.baseline))
        except NoFigureError as error:
            cell = f"none: {error}"
        table.add_row(escape(name), escape(cell))
    return table


def _ratio(model: ModelResult, name: str, baseline: str) -> Ratio | None:
    try:
        return model.ratio(name, baseline)
    except NoFigureError:
        return None


def _time_cells(median: float, iqr: float, n: int) -> tuple[str, str, str]:
    return f"{median * 1e3:.3f}", f"{iqr * 1e3:.3f}", str(n)


def _compile_cell(variant: VariantResult) -> str:
    if variant.compile_seconds_cold is None:
        return "-"
    warm = "" if variant.compile_seconds_warm is None else f" ({variant.compile_seconds_warm:.1f})"
    return f"{variant.compile_seconds_cold:.1f}{warm}"


def _mebibytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.1f}"


def _rules_cell(variant: VariantResult) -> str:
    return ", ".join(f"{name} {count}" for name, count in variant.rules.items()) or "-"


def _csv_row(report: Report, model: ModelResult, variant: VariantResult) -> dict[str, object]:
    summary = variant.summary
    ratio = _ratio(model, variant.name, report.baseline)
    return {
        "model": model.model,
        "variant": variant.name,
        "status": variant.status,
        "median_seconds": None if summary is None else summary.median,
        "iqr_seconds": None if summary is None else summary.iqr,
        "n": None if summary is None else summary.n,
        "ratio": None if ratio is None else ratio.value,
        "ratio_low": None if ratio is None else ratio.low,
        "ratio_high": None if ratio is None else ratio.high,
        "verdict": None if ratio is None else ratio.verdict,
        "compile_seconds_cold": variant.compile_seconds_cold,
        "compile_seconds_warm": variant.compile_seconds_warm,
        "peak_bytes": variant.peak_bytes,
        "saved_bytes": variant.saved_bytes,
        "rules": _rules_cell(variant),
        "message": variant.message,
    }
