"""One page that shows what an evaluation found: eval folder in, report.html and pass_at_k.{svg,png} out.

The page is a single file without scripts or network access. What a model wrote is shown as inert text: the
template escapes every value, and a content security policy forbids the browser to run or load anything.
"""

import collections
import functools
import io
import re
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
from etils import epath

from data_pipeline.files import write_atomically
from eval.files import parts, read_grades, read_metrics, read_problems, read_run, read_samples
from eval.metrics import NUM_PERMUTATIONS, NUM_RESAMPLES

MAX_PROBLEMS = 200  # in the browser of problems: keeps the page small, whatever the size of the test set
MAX_PER_VERDICT = 2  # right, and wrong, samples shown for a problem
HEAD_CHARS, TAIL_CHARS = 2000, 600  # kept of a long text; the tail too, because the answer stands there

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


def write_report(eval_dir: epath.PathLike) -> epath.Path:
    """Writes report.html, pass_at_k.svg and pass_at_k.png into an eval folder and returns the page's path.

    Reads run.json, metrics.json, problems.jsonl, samples/ and grades/. With one sample a problem there is no
    curve to draw: then the page has no figure, and the two image files are not written.

    Raises:
        UsageError: where there are no metrics yet.
        RunError: where a file is damaged.
    """
    import jinja2
    from markupsafe import Markup

    folder = epath.Path(eval_dir)
    run, metrics = read_run(folder), read_metrics(folder)
    problems, num_graded = _browser_problems(folder)
    complete, n = metrics["complete"] is True, metrics["num_samples"]
    names = {"ratio": f"PassRatio@{n}", "vote": f"maj@{n}", "pass": f"Pass@{n}"}
    if not complete:  # an unfinished run must not be quoted by the names of a finished one
        names = {"ratio": "Share right so far", "vote": "Vote so far", "pass": "Any right so far"}
    figures = {}
    if n > 1:
        for kind in ("svg", "png"):
            image = _figure(metrics, names, kind, width=7.6)
            write_atomically(folder / f"pass_at_k.{kind}", functools.partial(_write, image))
        # A phone gets a figure of its own: the wide one, scaled down, would have letters of 7 pixels.
        for variant, width in (("wide", 7.6), ("narrow", 3.7)):
            svg = _figure(metrics, names, "svg", width=width, page_variant=variant)
            figures[variant] = Markup(_as_part_of_the_page(svg))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(epath.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "interval": _interval, "shorten": _shorten}
    page = environment.get_template("report.html.j2").render(
        run=run,
        metrics=metrics,
        complete=complete,
        headline=headline(metrics, run),
        names=names,
        figures=figures,
        problems=problems,
        num_graded=num_graded,
        num_permutations=NUM_PERMUTATIONS,
        num_resamples=NUM_RESAMPLES,
        colours=COLOURS,
    )
    # A model can write what HTML and UTF-8 forbid (C0 controls, lone surrogates), and marks that turn letters
    # around, so that one reads what does not stand there (U+202A..202E, U+2066..2069).
    page = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u202a-\u202e\u2066-\u2069]", "\ufffd", page)
    content = page.encode("utf-8", errors="replace")
    write_atomically(folder / "report.html", functools.partial(_write, content))
    return folder / "report.html"


def _write(content: bytes, file: BinaryIO) -> None:
    file.write(content)


def headline(metrics: Mapping[str, Any], run: Mapping[str, Any]) -> tuple[str, str]:
    """What the numbers mean, and a sentence that explains it; says where they are close, or unfinished."""
    n, num_problems = metrics["num_samples"], metrics["num_problems"]
    ratio = metrics["pass_ratio"][str(n)]["value"]
    passed = metrics["pass_at"][str(n)]["value"]
    if metrics["complete"] is not True:
        every = "their sample" if n == 1 else f"all their {n:,} samples"
        return (
            f"This run is not finished: {num_problems:,} of {run['num_problems']:,} problems have {every}.",
            f"On those {num_problems:,} the model answers right in {percent(ratio)} of its samples, and for "
            f"{percent(passed)} of them at least one sample is right. The numbers will move, and the missing "
            "problems may be harder than these: do not quote them.",
        )
    if n == 1:
        sample = "one greedy sample" if run["temperature"] == 0 else "one sample"
        return (
            f"With {sample} each, the model answers {percent(ratio)} of {num_problems:,} problems right.",
            "One sample cannot tell what the model is unable to solve from what it solves only sometimes.",
        )
    if passed == 0:
        return (
            f"None of the {num_problems * n:,} samples is right.",
            "There is nothing yet that a vote or more samples could bring out.",
        )
    right = f"The model answers right in {percent(ratio)} of its samples"
    once = f"for {percent(passed)} of the problems at least one of {n:,} samples is right"
    # The way to a perfect score has two parts: problems solved only sometimes, and problems never solved.
    unreliable, unsolved = passed - ratio, 1 - passed
    if unreliable < 0.05 and unreliable < 0.1 * passed:  # 1 % against 4 % is near, but not the same
        never = f": for {percent(unsolved)} of the problems no sample is right." if unsolved >= 0.05 else "."
        return (
            f"{right}, and {once}: the two are close.",
            f"What it can solve, it solves nearly every time. More samples would add little{never}",
        )
    if passed == 1:
        return (f"{right}, yet {once}.", "No problem is beyond it: all that is missing is reliability.")
    if unreliable > unsolved:
        points_sometimes, points_missing = (round(100 * to) - round(100 * ratio) for to in (passed, 1))
        clearly = unreliable > 2 * unsolved
        missing = "not so much the ability as its reliability" if clearly else "more reliability than ability"
        return (
            f"{right}, yet {once}.",
            f"What is missing is {missing}: of the {points_missing} points between this model and one that "
            f"is always right, {points_sometimes} lie in problems that it does solve, only not every time.",
        )
    return (
        f"{right}, and {once}.",
        f"Reliability is the smaller part of what is missing: for {percent(unsolved)} of the problems no "
        "sample is right.",
    )


def percent(share: float, digits: int = 0) -> str:
    """0.934 as "93 %"; takes more digits where rounding would claim a 0 or a 100 that is not true."""
    while digits < 3 and 0 < share < 1 and float(f"{100 * share:.{digits}f}") in (0, 100):
        digits += 1
    return f"{100 * share:.{digits}f}\N{NARROW NO-BREAK SPACE}%"


def _interval(entry: Mapping[str, Any]) -> str:
    low, high = entry["ci95"]
    return f"{100 * low:.1f}–{100 * high:.1f}"


def _shorten(text: str) -> str:
    dropped = len(text) - HEAD_CHARS - TAIL_CHARS
    if dropped <= 0:
        return text
    return f"{text[:HEAD_CHARS]}\n\n[… {dropped:,} characters left out …]\n\n{text[-TAIL_CHARS:]}"


# ------------------------------------------------------------------------------------------------ problems


def _browser_problems(folder: epath.Path) -> tuple[list[dict[str, Any]], int]:
    """Graded problems, hardest first, at most MAX_PROBLEMS of them at even steps; and how many there were."""
    grades: dict[str, dict[int, tuple[bool, str | None]]] = collections.defaultdict(dict)
    for grade in read_grades(folder):
        verdict = (grade["correct"], grade["answer"])
        grades[grade["problem_id"]].setdefault(grade["sample_id"], verdict)  # the first of duplicates wins
    problems = []
    for problem in read_problems(folder):
        verdicts = grades.get(problem["problem_id"])
        if verdicts:
            right, total = sum(correct for correct, _ in verdicts.values()), len(verdicts)
            solved = "never" if right == 0 else "always" if right == total else "sometimes"
            problems.append({**problem, "right": right, "total": total, "solved": solved})
    num_graded = len(problems)
    problems.sort(key=lambda problem: problem["right"] / problem["total"])
    if num_graded > MAX_PROBLEMS:
        problems = [problems[i] for i in np.linspace(0, num_graded - 1, MAX_PROBLEMS).astype(int)]
    samples: dict[str, dict[int, dict[str, Any]]] = {problem["problem_id"]: {} for problem in problems}
    for part in parts(folder, "samples"):
        for sample in read_samples(part, grades)[0]:
            if sample["problem_id"] in samples and sample["sample_id"] in grades[sample["problem_id"]]:
                samples[sample["problem_id"]][sample["sample_id"]] = sample
    for problem in problems:
        problem["samples"] = _telling_samples(samples[problem["problem_id"]], grades[problem["problem_id"]])
    return problems, num_graded


def _telling_samples(
    samples: Mapping[int, Mapping[str, Any]], grades: Mapping[int, tuple[bool, str | None]]
) -> list[dict[str, Any]]:
    """Up to two right, then two wrong samples: of different texts, and different answers where there are any;
    the most frequent answers first."""
    chosen: list[dict[str, Any]] = []
    for wanted in (True, False):
        times = collections.Counter(answer for correct, answer in grades.values() if correct == wanted)
        distinct: dict[str, dict[str, Any]] = {}
        for sample_id, sample in sorted(samples.items()):
            correct, answer = grades[sample_id]
            if correct == wanted:
                shown = {**sample, "correct": correct, "answer": answer, "times": times[answer]}
                distinct.setdefault(sample["text"].strip(), shown)
        nth: collections.Counter[str | None] = collections.Counter()
        for sample in distinct.values():
            nth[sample["answer"]] += 1
            sample["nth"] = nth[sample["answer"]]
        ranked = sorted(distinct.values(), key=lambda sample: (sample["nth"], -sample["times"]))
        chosen += ranked[:MAX_PER_VERDICT]
    return chosen


# ------------------------------------------------------------------------------------------------ the figure


def _figure(
    metrics: Mapping[str, Any],
    names: Mapping[str, str],
    kind: str,
    *,
    width: float,
    page_variant: str | None = None,
) -> bytes:
    """Pass@k, maj@k and PassRatio over k, as "svg" or "png". For the page, text stays text."""
    import matplotlib
    from matplotlib.figure import Figure

    n, light = metrics["num_samples"], {name: light for name, (light, _) in COLOURS.items()}
    ends = {"ratio": metrics["pass_ratio"][str(n)]["value"]}
    style: dict[Any, Any] = {
        "font.size": 10,
        "svg.fonttype": "none" if page_variant else "path",
        # The page holds two figures: their ids must differ, and stay the same from one run to the next.
        "svg.hashsalt": page_variant or "file",
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, 3.9), facecolor="none" if page_variant else light["paper"])
        margin = 0 if page_variant else 0.12  # inches; the page has margins of its own
        left, right = (0.52 + margin) / width, (1.08 + margin) / width
        axes = figure.add_axes((left, 0.155, 1 - left - right, 0.735), facecolor="none")
        axes.set_xscale("log", base=2)
        axes.set(xlim=(1, n), ylim=(0, 1))
        ticks = [2**i for i in range(n.bit_length()) if n / 2**i > 1.5]
        ticks = [*ticks[:: 1 if page_variant != "narrow" else 2], n]
        axes.set_xticks(ticks, [str(k) for k in ticks])
        axes.set_xticks([], minor=True)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])
        axes.tick_params(length=0, pad=6, colors=light["muted"])
        axes.grid(axis="y", color=light["grid"], linewidth=0.8)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("samples per problem, k", color=light["muted"], labelpad=6)
        title = "problems answered right" + ("" if metrics["complete"] is True else " · unfinished run")
        figure.text(margin / width, 0.95, title, color=light["muted"])
        for name, key, line_width in (("vote", "maj_at", 1.6), ("pass", "pass_at", 2.6)):
            ks = sorted(int(k) for k in metrics[key])
            values = [metrics[key][str(k)]["value"] for k in ks]
            low, high = zip(*(metrics[key][str(k)]["ci95"] for k in ks), strict=True)
            axes.fill_between(ks, low, high, color=light[name], alpha=0.15, linewidth=0)
            axes.plot(ks, values, color=light[name], linewidth=line_width, clip_on=False)
            ends[name] = values[-1]
        axes.axhline(ends["ratio"], color=light["ratio"], linewidth=1.8, dashes=(5, 3))
        look: dict[str, Any]
        for name, height in _spread(ends, gap=0.135).items():
            label = names[name].removesuffix(" so far")
            for text, rise, size, weight in ((percent(ends[name]), 7, 12, "bold"), (label, -7, 9, "normal")):
                look = {"size": size, "weight": weight, "color": light[name], "va": "center"}
                axes.annotate(text, (1, height), (9, rise), ("axes fraction", "data"), "offset points", **look)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=200, metadata={"Date": None} if kind == "svg" else {})
    return buffer.getvalue()


def _spread(ends: Mapping[str, float], gap: float) -> dict[str, float]:
    """Heights for the labels: near their lines, but at least `gap` apart, and within the figure."""
    order = sorted(ends, key=lambda name: (ends[name], ["ratio", "vote", "pass"].index(name)))
    heights = [ends[name] for name in order]
    for _ in range(100):  # neighbours push each other by halves; three labels settle long before
        for i in range(len(heights) - 1):
            lack = max(0.0, gap - (heights[i + 1] - heights[i]))
            heights[i], heights[i + 1] = heights[i] - lack / 2, heights[i + 1] + lack / 2
        inward = max(0.0, 0.03 - heights[0]) + min(0.0, 0.97 - heights[-1])
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
