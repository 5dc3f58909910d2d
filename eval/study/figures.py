"""The figures of a study's report, as .svg and .png."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.figures import COLOURS
from eval.study.estimates import Estimate, Fit

# Okabe and Ito's, which colour-blind readers tell apart; the yellow left out, which paper swallows.
_COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#e69f00",
    "#000000",
    "#7f7f7f",
    "#8c564b",
    "#9467bd",
)
_MARKS = "os^Dv*P<>X"
_PAPER, _INK, _MUTED, _GRID = (COLOURS[name][0] for name in ("paper", "ink", "muted", "grid"))
_PANEL = (4.6, 3.5)  # inches
_LETTERS = 15  # of a legend, in an inch


@dataclass(frozen=True)
class Line:
    """Estimates along the horizontal axis, of one metric."""

    label: str
    x: Sequence[str]
    estimates: Sequence[Estimate]
    fit: Fit | None


@dataclass(frozen=True)
class Panel:
    """A metric's lines."""

    title: str
    is_share: bool
    lines: Sequence[Line]


def panels(drawn: Sequence[Panel], x_label: str, every_x: Sequence[str]) -> dict[str, bytes]:
    """A panel a metric; x runs over its labels, at the logarithm of numbers, else evenly."""
    rows = -(-len(drawn) // 2)
    columns = min(2, len(drawn))
    with _figure(columns, rows) as (figure, grid):
        places = _places(every_x)
        names = list(dict.fromkeys(line.label for panel in drawn for line in panel.lines))
        for panel, axes in zip(drawn, grid, strict=False):
            _panel(axes, panel, places, every_x, names, x_label)
        _legend(figure, grid)
        return _files(figure)


def step_laws(laws: Mapping[str, Mapping[str, Any]]) -> dict[str, bytes]:
    """Accuracy by steps, and the law fitted to all points (drawn through) and to the first four (dotted)."""
    with _figure(1, 1, wider=1.35) as (figure, (axes,)):
        for place, (label, law) in enumerate(laws.items()):
            colour = _COLOURS[place % len(_COLOURS)]
            steps = np.array([point["steps"] for point in law["points"]])
            values = [100 * point["value"] for point in law["points"]]
            ends = np.array([[100 * end for end in point["ci95"]] for point in law["points"]])
            shifted = steps + 0.06 * (place - (len(laws) - 1) / 2)
            axes.vlines(shifted, ends[:, 0], ends[:, 1], color=colour, linewidth=1.2)
            axes.plot(shifted, values, _MARKS[place % len(_MARKS)], color=colour, markersize=5)
            every = np.linspace(steps[0], steps[-1], 100)
            base, first = law["all"]["accuracy_step"], law["first_four"]["accuracy_step"]
            axes.plot(every, 100 * base**every, color=colour, linewidth=1.8, label=f"{label}: {base:.3f}")
            if law["first_four"]["points"] < law["all"]["points"]:
                axes.plot(every, 100 * first**every, color=colour, linewidth=1.2, linestyle=":")
        axes.set_xticks(sorted({point["steps"] for law in laws.values() for point in law["points"]}))
        axes.set_xlabel("steps in the reference solution", color=_MUTED)
        axes.set_ylim(0, min(102, axes.get_ylim()[1]))
        axes.set_title("samples answered right, % = accuracy of a step ^ steps", size=10, color=_MUTED, loc="left")
        _legend(figure, [axes])
        return _files(figure)


def _panel(
    axes: Any,
    panel: Panel,
    places: Mapping[str, float],
    every_x: Sequence[str],
    every_line: Sequence[str],
    x_label: str,
) -> None:
    scale = 100 if panel.is_share else 1
    numeric = are_numbers(every_x)
    names = list(every_line)
    width = 0.12 * min(np.diff(sorted(places.values())), default=1.0)
    for line in panel.lines:
        number = names.index(line.label)
        colour = _COLOURS[number % len(_COLOURS)]
        shift = width * (number - (len(names) - 1) / 2) * (1 if not numeric else 0.35)
        x = np.array([places[label] for label in line.x]) + shift
        y = scale * np.array([each.value for each in line.estimates])
        ends = scale * np.array([each.ci95 or (each.value, each.value) for each in line.estimates])
        axes.vlines(x, ends[:, 0], ends[:, 1], color=colour, linewidth=1.3, alpha=0.8)
        mark = _MARKS[number % len(_MARKS)]
        axes.plot(x, y, mark + ("-" if numeric else ""), color=colour, linewidth=1.6, markersize=5, label=line.label)
        for place, each in zip(x, line.estimates, strict=True):
            axes.plot([place] * len(each.by_seed), [scale * v for v in each.by_seed.values()], "_", color=colour, ms=7)
        if line.fit is not None and line.fit.straight:
            logs = np.array(sorted(places[label] for label in line.x))
            axes.plot(
                logs, scale * (line.fit.intercept + line.fit.slope.value * logs), ":", color=colour, linewidth=1.1
            )
    axes.set_xticks([places[label] for label in every_x], [short_number(label) for label in every_x])
    if not numeric:
        axes.set_xlim(-0.5, len(every_x) - 0.5)
    if not numeric and max(map(len, every_x)) > 9:
        axes.tick_params(axis="x", rotation=30)
    axes.set_xlabel(x_label, color=_MUTED)
    title = ", ".join(part for part in (panel.title, "%" if panel.is_share else "") if part)
    axes.set_title(title, size=10, color=_MUTED, loc="left")
    if panel.is_share:
        low, high = axes.get_ylim()
        axes.set_ylim(max(0, low), min(102, high))


def are_numbers(labels: Sequence[str]) -> bool:
    """Whether all labels of an axis are positive numbers: then it is one of sizes."""
    try:
        return all(float(label) > 0 for label in labels)
    except ValueError:
        return False


def short_number(label: str) -> str:
    """960000 as 960K; what is no number as it is."""
    if not are_numbers([label]):
        return label
    number = float(label)
    for size, letter in ((1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:g}"


def _places(labels: Sequence[str]) -> dict[str, float]:
    if are_numbers(labels):
        return {label: float(np.log2(float(label))) for label in labels}
    return {label: float(place) for place, label in enumerate(labels)}


class _figure:
    """A figure of panels, in the look of all of ours."""

    def __init__(self, columns: int, rows: int, wider: float = 1.0):
        self._columns, self._rows, self._wider = columns, rows, wider

    def __enter__(self) -> tuple[Any, list[Any]]:
        import matplotlib
        from matplotlib.figure import Figure

        self._context = matplotlib.rc_context({"font.size": 9, "svg.fonttype": "path", "svg.hashsalt": "study"})
        self._context.__enter__()
        size = (self._wider * _PANEL[0] * self._columns, _PANEL[1] * self._rows)
        figure = Figure(figsize=size, facecolor=_PAPER, layout="constrained")
        grid = [figure.add_subplot(self._rows, self._columns, place + 1) for place in range(self._columns * self._rows)]
        for axes in grid:
            axes.set_facecolor(_PAPER)
            axes.grid(axis="y", color=_GRID, linewidth=0.8)
            axes.spines[:].set_visible(False)
            axes.tick_params(length=0, pad=5, colors=_MUTED)
        return figure, grid

    def __exit__(self, *raised: Any) -> None:
        self._context.__exit__(*raised)


def _legend(figure: Any, panels: Sequence[Any]) -> None:
    """Below all panels, where lines have names; in as many columns as their names leave room for."""
    named: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    handles, labels = list(named.values()), list(named)
    if any(labels):
        fitting = int(_LETTERS * figure.get_size_inches()[0] / (max(map(len, labels)) + 6))  # 6: the mark
        columns = max(1, min(4, len(labels), fitting))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, labelcolor=_INK)


def _files(figure: Any) -> dict[str, bytes]:
    for axes in figure.axes:
        if not axes.has_data():
            axes.set_visible(False)
    content = {}
    for kind in ("svg", "png"):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else {})
        content[kind] = buffer.getvalue()
    return content
