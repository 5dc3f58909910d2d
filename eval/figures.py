"""The figures of a report: drawn once as files, once as a part of the page in its colours and letters."""

import functools
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

# (light, dark). Text on paper has a contrast of at least 4.5:1 (WCAG AA); blue, orange and grey stay apart
# for colour-blind readers. The figure is drawn in the light ones, which the page replaces by CSS variables.
COLOURS = {
    "paper": ("#fdfcf9", "#15171a"),
    "card": ("#f6f3ec", "#1d2024"),
    "ink": ("#1f2328", "#e7e5e0"),
    "muted": ("#62676d", "#9ba0a6"),
    "grid": ("#e3dfd6", "#2f3338"),
    "pass": ("#1d5fa8", "#7fb4f0"),
    "ratio": ("#b04a0c", "#f0a066"),
    "vote": ("#67626f", "#b3adbd"),
}
_HEIGHT = 3.9  # inches
_WIDE, _NARROW = 7.6, 3.7  # a phone gets a figure of its own: the wide one, scaled down, had letters of 7 pixels
_TYPES = {"calculation": ("ratio", "calculation"), "reasoning": ("vote", "reasoning")}
_LIGHT = {name: light for name, (light, _) in COLOURS.items()}

# Draws into axes; told are their width in inches, and whether it is the narrow one.
Paint = Callable[[Any, float, bool], None]


def percent(share: float, digits: int = 0) -> str:
    """0.934 as "93 %"; takes more digits where rounding would claim a 0 or a 100 that is not true."""
    while digits < 3 and 0 < share < 1 and float(f"{100 * share:.{digits}f}") in (0, 100):
        digits += 1
    return f"{100 * share:.{digits}f}\N{NARROW NO-BREAK SPACE}%"


def files(paint: Paint, title: str) -> dict[str, bytes]:
    """A figure as the content of an .svg and a .png file."""
    return {kind: _drawn(paint, title, kind, _WIDE, None) for kind in ("svg", "png")}


def on_the_page(paint: Paint, title: str, name: str) -> dict[str, Markup]:
    """A figure as two pieces of HTML, "wide" and "narrow". `name` keeps its ids apart from other figures'."""
    return {
        variant: Markup(_as_part_of_the_page(_drawn(paint, title, "svg", width, f"{name} {variant}")))
        for variant, width in (("wide", _WIDE), ("narrow", _NARROW))
    }


def pass_at_k(metrics: Mapping[str, Any], names: Mapping[str, str]) -> Paint:
    """Pass@k, maj@k and PassRatio over k."""
    return functools.partial(_pass_at_k, metrics, names)


def step_law(law: Mapping[str, Any]) -> Paint:
    """Accuracy by the number of steps in the gold solution, with both fits of the step law."""
    return functools.partial(_step_law, law)


def error_types(runs: Sequence[Mapping[str, Any]]) -> Paint:
    """Shares of samples that go wrong by calculation and by reasoning, over runs {label, calculation, reasoning}."""
    return functools.partial(_error_types, runs)


def _error_types(runs: Sequence[Mapping[str, Any]], axes: Any, width: float, narrow: bool) -> None:
    places = range(len(runs))
    axes.set(xlim=(-0.3, len(runs) - 0.7), ylim=(0, max(0.05, *(1.15 * run[name] for run in runs for name in _TYPES))))
    axes.set_yticks(axes.get_yticks(), [percent(tick) for tick in axes.get_yticks()])
    every = range(0, len(runs), 1 + (len(runs) - 1) // (4 if narrow else 10))
    axes.set_xticks(list(every), [runs[place]["label"] for place in every])
    ends = {}
    for name, (colour, _) in _TYPES.items():
        values = [run[name] for run in runs]
        axes.plot(places, values, "o-", color=_LIGHT[colour], linewidth=2, markersize=5, clip_on=False)
        ends[colour] = values[-1]
    for colour, height in _spread(ends, gap=0.135 * axes.get_ylim()[1], top=axes.get_ylim()[1]).items():
        label = next(text for own, text in _TYPES.values() if own == colour)
        _label(axes, height, _LIGHT[colour], percent(ends[colour], 1), label)


def _pass_at_k(metrics: Mapping[str, Any], names: Mapping[str, str], axes: Any, width: float, narrow: bool) -> None:
    n = metrics["num_samples"]
    ends = {"ratio": metrics["pass_ratio"][str(n)]["value"]}
    axes.set_xscale("log", base=2)
    axes.set(xlim=(1, n))
    ticks = [2**i for i in range(n.bit_length()) if n / 2**i > 1.5]
    ticks = [*ticks[:: 2 if narrow else 1], n]
    axes.set_xticks(ticks, [str(k) for k in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("samples per problem, k", color=_LIGHT["muted"], labelpad=6)
    for name, key, line_width in (("vote", "maj_at", 1.6), ("pass", "pass_at", 2.6)):
        ks = sorted(int(k) for k in metrics[key])
        values = [metrics[key][str(k)]["value"] for k in ks]
        low, high = zip(*(metrics[key][str(k)]["ci95"] for k in ks), strict=True)
        axes.fill_between(ks, low, high, color=_LIGHT[name], alpha=0.15, linewidth=0)
        axes.plot(ks, values, color=_LIGHT[name], linewidth=line_width, clip_on=False)
        ends[name] = values[-1]
    axes.axhline(ends["ratio"], color=_LIGHT["ratio"], linewidth=1.8, dashes=(5, 3))
    for name, height in _spread(ends, gap=0.135).items():
        _label(axes, height, _LIGHT[name], percent(ends[name]), names[name].removesuffix(" so far"))


def _step_law(law: Mapping[str, Any], axes: Any, width: float, narrow: bool) -> None:
    points = law["points"]
    steps = [point["steps"] for point in points]
    last_first = steps[min(law["first_four"]["points"], len(steps)) - 1]
    axes.set(xlim=(steps[0] - 0.4, steps[-1] + 0.4))
    axes.set_xticks(steps)
    axes.set_xlabel("steps in the reference solution", color=_LIGHT["muted"], labelpad=6)
    within, beyond = np.linspace(steps[0], last_first, 100), np.linspace(last_first, steps[-1], 100)
    every = np.linspace(steps[0], steps[-1], 200)
    axes.plot(every, law["all"]["accuracy_step"] ** every, color=_LIGHT["pass"], linewidth=2.2)
    first = law["first_four"]["accuracy_step"]
    axes.plot(within, first**within, color=_LIGHT["vote"], linewidth=1.4)
    axes.plot(beyond, first**beyond, color=_LIGHT["vote"], linewidth=1.4, dashes=(3, 3))
    for point in points:
        axes.plot([point["steps"]] * 2, point["ci95"], color=_LIGHT["ratio"], linewidth=1.4)
    axes.plot(steps, [point["value"] for point in points], "o", color=_LIGHT["ratio"], markersize=6, clip_on=False)
    ends = {"pass": law["all"]["accuracy_step"] ** steps[-1], "vote": first ** steps[-1]}
    label = {"pass": ("all points", law["all"]), "vote": (f"first {law['first_four']['points']}", law["first_four"])}
    for name, height in _spread(ends, gap=0.135).items():
        text, fitted = label[name]
        _label(axes, height, _LIGHT[name], f"{fitted['accuracy_step']:.3f}\u02e2", text)


def _label(axes: Any, height: float, colour: str, value: str, name: str) -> None:
    """A value and, below it, what it is of, right of the axes."""
    for text, rise, size, weight in ((value, 7, 12, "bold"), (name, -7, 9, "normal")):
        look: dict[str, Any] = {"size": size, "weight": weight, "color": colour, "va": "center"}
        axes.annotate(text, (1, height), (9, rise), ("axes fraction", "data"), "offset points", **look)


def _drawn(paint: Paint, title: str, kind: str, width: float, salt: str | None) -> bytes:
    """A figure of shares, as "svg" or "png". With `salt` it is for the page: text stays text."""
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "font.size": 10,
        "svg.fonttype": "none" if salt else "path",
        "svg.hashsalt": salt or "file",  # ids that differ on a page, and stay the same from one run to the next
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, _HEIGHT), facecolor="none" if salt else _LIGHT["paper"])
        margin = 0 if salt else 0.12  # inches; the page has margins of its own
        left, right = (0.52 + margin) / width, (1.08 + margin) / width
        axes = figure.add_axes((left, 0.155, 1 - left - right, 0.735), facecolor="none")
        axes.set(ylim=(0, 1))
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])
        axes.tick_params(length=0, pad=6, colors=_LIGHT["muted"])
        axes.grid(axis="y", color=_LIGHT["grid"], linewidth=0.8)
        axes.spines[:].set_visible(False)
        figure.text(margin / width, 0.95, title, color=_LIGHT["muted"])
        paint(axes, width, width < _WIDE)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=200, metadata={"Date": None} if kind == "svg" else {})
    return buffer.getvalue()


def _spread(ends: Mapping[str, float], gap: float, top: float = 1.0) -> dict[str, float]:
    """Heights for the labels: near their lines, but at least `gap` apart, and within the figure."""
    order = sorted(ends, key=lambda name: (ends[name], ["ratio", "vote", "pass"].index(name)))
    heights = [ends[name] for name in order]
    for _ in range(100):  # neighbours push each other by halves; three labels settle long before
        for i in range(len(heights) - 1):
            lack = max(0.0, gap - (heights[i + 1] - heights[i]))
            heights[i], heights[i + 1] = heights[i] - lack / 2, heights[i + 1] + lack / 2
        inward = max(0.0, 0.03 * top - heights[0]) + min(0.0, 0.97 * top - heights[-1])
        heights = [height + inward for height in heights]
    return dict(zip(order, heights, strict=True))


def _as_part_of_the_page(svg: bytes) -> str:
    """The figure in the page's colours and letters, without ids and styles that would leak into the page."""
    text = svg.decode()
    text = '<svg aria-hidden="true" ' + text[text.index("<svg ") + len("<svg ") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r' width="[^"]*" height="[^"]*"', "", text, count=1)  # CSS decides
    text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
    for name, (light, _) in COLOURS.items():
        text = text.replace(light, f"var(--{name})")
    return text
