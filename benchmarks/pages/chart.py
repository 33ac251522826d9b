"""The README's chart: every model's speed against stock inductor, and the geometric means, by machine.

The figures that were drawn are kept inside the PNG, so that a chart can be seen to be out of date whatever
version of matplotlib drew it. Its background is opaque: it reads the same on a light page and on a dark one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.pages.means import Figure, Means, Row, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CHART = Path(__file__).parents[1] / "chart.png"

_BACKGROUND, _INK, _FAINT = "#f6f8fa", "#1f2328", "#8c959f"
_OURS, _OTHERS = "#0a5fd0", "#59636e"
_KEY = "Description"  # a keyword of the PNG standard


def is_drawn(means: Means, path: Path) -> bool:
    """Whether the chart there shows these figures."""
    from PIL import Image

    if not path.exists():
        return False
    with Image.open(path) as image:
        return image.info.get(_KEY) == _figures(means)


def draw_chart(means: Means, path: Path) -> None:
    """Writes the chart: a panel for each machine, a line for each row of the table."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    panels = max(1, len(means.machines))
    places = _places(means)
    size = (2.4 + 2.0 * panels, 1.3 + 0.27 * (1 + max(places.values(), default=0)))
    with plt.rc_context({"font.size": 10, "text.color": _INK, "axes.edgecolor": _FAINT}):
        figure, grid = plt.subplots(
            1, panels, sharex=True, sharey=True, squeeze=False, figsize=size, layout="constrained"
        )
        figure.set_facecolor(_BACKGROUND)
        for axes, machine in zip(grid[0], means.machines, strict=False):
            _draw_machine(axes, means, machine, places)
        left, right = grid[0, 0].get_xlim()
        grid[0, 0].set_xlim(left, right + 0.25 * (right - left))  # where the figures stand
        figure.suptitle(
            f"Times as fast as stock inductor ({means.common})\n"
            "dot: one model; line: geometric mean with its 95 % interval",
            fontsize="medium",
        )
        figure.savefig(path, dpi=160, format="png", metadata={_KEY: _figures(means)})
    plt.close(figure)


def _places(means: Means) -> dict[Row | str, int]:
    """The line of each row, below that of the setting which it shares with the next."""
    places: dict[Row | str, int] = {}
    for row in means.rows:
        places.setdefault(means.setting(row), len(places))
        places[row] = len(places)
    return places


def _draw_machine(axes: Axes, means: Means, machine: str, places: dict[Row | str, int]) -> None:
    axes.set_facecolor(_BACKGROUND)
    axes.set_title(short(machine).replace(", ", "\n", 1), fontsize="medium")
    axes.set_yticks(
        list(places.values()), [place if isinstance(place, str) else _plain(place) for place in places]
    )
    axes.set_ylim(len(places) - 0.4, -0.5)
    axes.tick_params(colors=_INK, length=0)
    # Only the first panel has labels.
    for label, place in zip(axes.get_yticklabels(), places, strict=False):
        label.set_fontweight("bold" if isinstance(place, str) else "normal")
    axes.grid(axis="x", color=_FAINT, alpha=0.3, linewidth=0.6)
    axes.axvline(1.0, color=_INK, linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    for row in means.rows:
        figure = means.figures.get((row, machine))
        if figure is not None:
            _draw_figure(axes, places[row], figure, _OURS if row.is_ours else _OTHERS)


def _draw_figure(axes: Axes, place: int, figure: Figure, color: str) -> None:
    ratios = [ratio.value for ratio in figure.models.values()]
    axes.plot(ratios, [place] * len(ratios), "o", color=color, alpha=0.4, markersize=4, markeredgewidth=0)
    mean = figure.mean
    if mean is None:
        return
    if mean.low is not None and mean.high is not None:
        axes.plot(
            [mean.low, mean.high], [place, place], color=color, linewidth=7, solid_capstyle="butt", alpha=0.5
        )
    axes.plot([mean.value], [place], "|", color=color, markersize=11, markeredgewidth=2)
    axes.annotate(
        f"{mean.value:.2f}",
        (1.0, place),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="center",
        color=color,
        fontweight="bold",
    )


def _plain(row: Row) -> str:
    """The compiler's name without the marks of Markdown."""
    return row.compiler.replace("`", "")


def _figures(means: Means) -> str:
    """What is drawn, as JSON; rounded, as another version of numpy may give another last digit."""
    drawn = []
    for (row, machine), figure in means.figures.items():
        mean = figure.mean
        summary = None if mean is None else [mean.value, mean.low, mean.high]
        ratios = {name: ratio.value for name, ratio in figure.models.items()}
        drawn.append([machine, means.setting(row), row.compiler, _rounded(summary), _rounded(ratios)])
    return json.dumps(sorted(drawn, key=str))


def _rounded(given: object) -> object:
    return json.loads(json.dumps(given), parse_float=lambda text: round(float(text), 3))
