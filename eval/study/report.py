"""The report of a study: report.md, the same as report.html, figures, and study.json for programs."""

import base64
import dataclasses
import functools
import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from etils import epath

from data_pipeline.files import write_atomically, write_json, write_text
from data_pipeline.pages import write_page
from eval.files import read_metrics
from eval.study.analysis import Difference, Table, differences_of, is_share, numbers, steps_of, title_of
from eval.study.estimates import Estimate
from eval.study.figures import Panel, are_numbers, panels, short_number, step_laws
from eval.study.grid import Cell
from eval.study.record import done_stages, read_record
from eval.study.results import Point, points_of
from eval.study.settings import Contrast, StudySettings, published_tables

Row = list[str]


def write_study_report(
    settings: StudySettings, cells: Sequence[Cell], failed: Sequence[tuple[Cell, str]] = ()
) -> epath.Path:
    """Writes the report on the cells that are done, and names those that failed; returns the page's path.

    Raises UsageError where cells that are done do not hold the same problems.
    """
    out = epath.Path(settings.out)
    points = points_of(settings, cells)
    table = Table(settings, points)
    figures = _figures(settings, points, table)
    for name, content in figures.items():
        for kind, data in content.items():
            write_atomically(out / f"{name}.{kind}", functools.partial(_write, data))
    parts = list(_text(settings, cells, failed, points, table, figures))
    write_text(out / "report.md", "\n\n".join(parts) + "\n")
    write_json(out / "study.json", numbers(settings, cells, points, table))
    write_page(
        out / "report.html",
        Path(__file__).with_name("report.html.j2"),
        title=settings.title,
        body=_as_html("\n\n".join(parts), {name: content["svg"] for name, content in figures.items()}),
    )
    return out / "report.html"


def _figures(settings: StudySettings, points: Sequence[Point], table: Table) -> dict[str, dict[str, bytes]]:
    drawn = []
    for metric in settings.report.metrics:
        lines = [line for name in table.lines if (line := table.line(metric, name)) is not None]
        if lines:
            drawn.append(Panel(title_of(metric, settings), is_share(metric), lines))
    shares = [panel for panel in drawn if panel.is_share]
    if len(table.lines) == 1 and len(shares) > 1:  # what one line is of each metric stands in one picture
        together = [dataclasses.replace(panel.lines[0], label=panel.title) for panel in shares]
        drawn = [Panel("", True, together), *(panel for panel in drawn if not panel.is_share)]
    figures = {}
    if drawn:
        figures["metrics"] = panels(drawn, settings.report.x, table.x_labels)
    if settings.report.step_law is not None:
        laws = {", ".join(point.labels.values()): point.step_law(settings.report.step_law) for point in points}
        known = {label: law for label, law in laws.items() if law is not None}
        if known:
            figures["step_law"] = step_laws(known)
    return figures


def _text(
    settings: StudySettings,
    cells: Sequence[Cell],
    failed: Sequence[tuple[Cell, str]],
    points: Sequence[Point],
    table: Table,
    figures: dict[str, Any],
) -> Iterator[str]:
    done = sum(len(point.cells) for point in points)
    yield f"# {settings.title}"
    if settings.about:
        yield settings.about.strip()
    yield f"**Scale.** {settings.scale.strip()} {_budget(settings, points)}"
    if failed:
        listed = "\n".join(f"- {cell.name}: {message.splitlines()[0]}" for cell, message in failed)
        yield f"**Failed.** {len(failed)} of {len(cells)} cells.\n\n{listed}"
    if done < len(cells):
        yield f"**Unfinished.** {done} of {len(cells)} cells are done; the numbers will move."
    if not points:
        return
    yield "## Measured here"
    if "metrics" in figures:
        yield f"![{settings.title}: measured here](metrics.png)"
        lines = [table.line(metric, name) for metric in settings.report.metrics for name in table.lines]
        fitted = any(line is not None and line.fit is not None and line.fit.straight for line in lines)
        yield (
            "Marks are means over seeds, bars their 95 % intervals, ticks single seeds"
            f"{', dotted lines the fits' if fitted else ''}."
        )
    yield _main_table(settings, points, table)
    yield _reading(settings, points)
    fits = list(_fits(settings, table))
    if not fits and are_numbers(table.x_labels) and len(table.x_labels) > 1:
        yield f"No fit over {settings.report.x}: that takes three points, since a line goes through any two."
    if fits:
        yield f"## Over the logarithm of {settings.report.x}"
        yield "\n".join(fits)
    contrasts = [
        (each, found) for each in settings.report.contrasts if (found := differences_of(settings, points, each))
    ]
    for contrast, found in contrasts:
        yield from _contrast(settings, contrast, found)
    if contrasts:
        yield _meaning([contrast.metric for contrast, _ in contrasts], sum(len(found) for _, found in contrasts))
    if "step_law" in figures:
        yield "## Step law"
        yield (
            "Share of right samples by the number of steps in the reference solution, all seeds together, and "
            "accuracy = (accuracy of a step) ^ steps, fitted to all points (drawn through) and to the first four "
            "(dotted). Intervals here are over problems only; a point whose own holds the law does not rule it out. "
            "The last columns have the accuracy of a step that each number of steps asks for alone: alike where the "
            "law holds."
        )
        yield "![The step law](step_law.png)"
        yield _law_table(settings, points)
    for published in published_tables(settings.report.published).values():
        yield f"## Published: {published['title']}"
        if published.get("about"):
            yield str(published["about"]).strip()
        yield _markdown([published["columns"], *([str(value) for value in row] for row in published["rows"])])
    yield "## Every run"
    yield _every_run(settings, points, table)
    yield _versions(points)


def _budget(settings: StudySettings, points: Sequence[Point]) -> str:
    """By which rule the cells are trained equally."""
    epochs = {cell.train.num_epochs for point in points for cell in point.cells}
    steps = {cell.train.num_steps for point in points for cell in point.cells}
    batch = {f"{c.train.batch_size} rows of {c.train.data.context} tokens" for p in points for c in p.cells}
    if not points:
        return ""
    rule = (
        f"every run takes {next(iter(steps)):,} optimizer steps, whatever its data"
        if steps != {None} and len(steps) == 1
        else f"every run takes {next(iter(epochs))} epochs of its data"
        if epochs != {None} and len(epochs) == 1
        else "the length of training differs between runs, see the last table"
    )
    seeds = len(settings.seeds)
    told = "one seed: intervals do not cover the luck of training" if seeds == 1 else f"{seeds} seeds"
    return f"Training budget: {rule} (a step is {' or '.join(sorted(batch))}); {told}."


def _main_table(settings: StudySettings, points: Sequence[Point], table: Table) -> str:
    metrics = settings.report.metrics
    rows = [[*settings.axes, *(title_of(metric, settings) + _unit(metric) for metric in metrics)]]
    for index, point in enumerate(points):
        labels = [short_number(label) if axis == settings.report.x else label for axis, label in point.labels.items()]
        rows.append([*labels, *(_shown(table.estimate(metric, index), metric) for metric in metrics)])
    return _markdown(rows)


def _reading(settings: StudySettings, points: Sequence[Point]) -> str:
    seeds = "and seeds" if len(settings.seeds) > 1 else "only, as there is one seed"
    said = f"Mean over seeds, in brackets its 95 % interval over problems {seeds}; none where nothing varies."
    said += " Intervals do not cover another base model, or other training data to draw from."
    if any(metric.endswith(":first_false_position") for metric in settings.report.metrics):
        said += " That of the first false equation's place is over seeds only."
    for name, given in points[0].cells[0].evals.items():
        how = f"{given.num_samples} samples a problem at temperature {given.temperature:g}"
        said += f" {name}: {how if given.temperature else 'one answer a problem, decoded greedily'}"
        said += f"{_cut_off(name, points)}."
    return said


def _cut_off(name: str, points: Sequence[Point]) -> str:
    """How many samples of an eval ended at max_tokens, if any did."""
    shares = {cell.name: _truncated(cell, name) for point in points for cell in point.cells}
    worst = max(shares, key=lambda cell: shares[cell])
    cut = sum(share > 0 for share in shares.values())
    told = f"cut off at max_tokens in {cut} of {len(shares)} runs, most often in {worst}"
    return f", {told} ({100 * shares[worst]:.2g} % of the samples)" if cut else ""


def _truncated(cell: Cell, name: str) -> float:
    folder = epath.Path(cell.evals[name].out)
    return float(read_metrics(folder)["truncated_fraction"]) if (folder / "metrics.json").exists() else 0.0


def _fits(settings: StudySettings, table: Table) -> Iterator[str]:
    for metric in settings.report.metrics:
        for name in table.lines:
            line = table.line(metric, name)
            if line is None or line.fit is None:
                continue
            of, fit, unit = f" ({name})" if name else "", line.fit, " points" if is_share(metric) else ""
            slope = f"{_signed(fit.slope, metric)}{unit} for each doubling"
            way = "no clear direction" if not fit.slope.clear else "rises" if fit.slope.value > 0 else "falls"
            told = f"{way}, {slope}; no point lies further than {_size(fit.off, metric)}{unit} from the line"
            if not fit.straight:
                told = (
                    f"{way}, but along no straight line: {slope} on average, points up to {_size(fit.off, metric)}"
                    f"{unit} from it; between the last two sizes {_signed(fit.last, metric)}{unit}"
                )
            yield f"- {title_of(metric, settings)}{of}: {told}."


def _contrast(settings: StudySettings, contrast: Contrast, found: Sequence[Difference]) -> Iterator[str]:
    yield f"## {contrast.second} against {contrast.first}: {title_of(contrast.metric, settings)}"
    unit, share = _unit(contrast.metric), is_share(contrast.metric)
    up, down = ("better", "worse") if share else ("larger", "smaller")
    columns = {
        ", ".join(axis for axis in settings.axes if axis != contrast.axis): [each.where for each in found],
        "problems": [each.group for each in found],
        "number": ["" if each.num_problems is None else str(each.num_problems) for each in found],
        f"{contrast.first}{unit}": [_number(each.first, contrast.metric) for each in found],
        f"{contrast.second}{unit}": [_number(each.second, contrast.metric) for each in found],
        f"difference, {'points' if share else 'nats'}": [_signed(each.difference, contrast.metric) for each in found],
        "verdict": [
            "undecided" if not each.difference.clear else up if each.difference.value > 0 else down for each in found
        ],
    }
    if contrast.by is None:
        del columns["problems"]
    told = {name: column for name, column in columns.items() if any(column)}
    yield _markdown([list(told), *(list(row) for row in zip(*told.values(), strict=True))])


def _meaning(metrics: Sequence[str], number: int) -> str:
    """How to read all differences, of which there are `number`."""
    told = ["In differences, the same problems and seeds stand on both sides."]
    if not all(map(is_share, metrics)):
        told.append(
            "Those of losses take the examples of the two sides for different ones, so that their intervals are wider "
            "than need be where an example is hard for both."
        )
    told.append("A verdict stands where the 95 % interval leaves zero out.")
    if number > 1:
        told.append(f"Of the {number} differences above, {number / 20:.2g} would have one by chance if none were real.")
    return " ".join(told)


def _law_table(settings: StudySettings, points: Sequence[Point]) -> str:
    every = sorted(
        {p["steps"] for of in points if (law := of.step_law(settings.report.step_law or "")) for p in law["points"]}
    )
    told = ("accuracy of a step, all points", "of the first four", "largest distance, points", "not ruled out by")
    rows = [[*settings.axes, *told, *(f"by {steps} steps" for steps in every)]]
    for point in points:
        law = point.step_law(settings.report.step_law or "")
        if law is None:
            continue
        lawful = [law["all"]["accuracy_step"] ** p["steps"] for p in law["points"]]
        off = max(abs(p["value"] - value) for p, value in zip(law["points"], lawful, strict=True))
        held = sum(p["ci95"][0] <= value <= p["ci95"][1] for p, value in zip(law["points"], lawful, strict=True))
        fits = [
            f"{law[k]['accuracy_step']:.3f} [{law[k]['ci95'][0]:.3f}, {law[k]['ci95'][1]:.3f}]"
            for k in ("all", "first_four")
        ]
        alone = {p["steps"]: f"{p['value'] ** (1 / p['steps']):.2f}" for p in law["points"]}
        held_by = f"{held} of {len(lawful)} points"
        rows.append([*point.labels.values(), *fits, f"{100 * off:.1f}", held_by, *(alone.get(s, "-") for s in every)])
    return _markdown(rows)


def _every_run(settings: StudySettings, points: Sequence[Point], table: Table) -> str:
    metrics = settings.report.metrics
    rows = [["run", "steps", "minutes", *(title_of(metric, settings) + _unit(metric) for metric in metrics)]]
    for index, point in enumerate(points):
        for cell in point.cells:
            values = []
            for metric in metrics:
                found = table.estimate(metric, index)
                value = None if found is None else found.by_seed.get(cell.seed)
                values.append("-" if value is None else _number(value, metric))
            rows.append([cell.name, f"{steps_of(cell):,}", f"{sum(done_stages(cell).values()) / 60:.1f}", *values])
    return _markdown(rows)


def _versions(points: Sequence[Point]) -> str:
    """What the runs were made with, and when."""
    done = [entry for point in points for cell in point.cells for entry in read_record(cell)["done"].values()]
    versions: dict[str, set[str]] = {}
    for entry in done:
        for name, version in entry["versions"].items():
            versions.setdefault(name, set()).add(version)
    told = ", ".join(f"{name} {' and '.join(sorted(of))}" for name, of in versions.items())
    first, last = (day[:10] for day in (min(entry["at"] for entry in done), max(entry["at"] for entry in done)))
    days = first if first == last else f"{first} to {last}"
    return (
        f"Made on {days} with {told}, Python {platform.python_version()}; report written on a machine with "
        f"{os.cpu_count()} CPU cores. The study as it was run is `study.yaml` beside this file."
    )


def _unit(metric: str) -> str:
    return ", %" if is_share(metric) else ""


def _number(value: float, metric: str) -> str:
    """A value: percent, or nats, with the sign of what is a difference."""
    sign = "+" if metric in ("leakage:d1", "leakage:d2") else ""
    return f"{100 * value:.1f}" if is_share(metric) else f"{value:{sign}.3f}"


def _size(value: float, metric: str) -> str:
    return f"{100 * value:.1f}" if is_share(metric) else f"{value:.3f}"


def _shown(found: Estimate | None, metric: str) -> str:
    if found is None:
        return "-"
    if found.ci95 is None:
        return _number(found.value, metric)
    low, high = found.ci95
    return f"{_number(found.value, metric)} [{_number(low, metric)}, {_number(high, metric)}]"


def _signed(found: Estimate, metric: str) -> str:
    """A difference, in points where the metric is a share."""
    scale, digits = (100, 1) if is_share(metric) else (1, 3)
    value = f"{scale * found.value:+.{digits}f}"
    if found.ci95 is None:
        return value
    low, high = (scale * end for end in found.ci95)
    return f"{value} [{low:+.{digits}f}, {high:+.{digits}f}]"


def _markdown(rows: Sequence[Row]) -> str:
    """A table; the first row is its head."""
    lines = ["| " + " | ".join(str(value).replace("|", "\\|") for value in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def _as_html(text: str, figures: dict[str, bytes]) -> Any:
    """The Markdown as HTML with its figures inside; text of others' is escaped."""
    from markdown_it import MarkdownIt
    from markupsafe import Markup

    html = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    for name, svg in figures.items():
        html = html.replace(f'src="{name}.png"', f'src="data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"')
    return Markup(html.replace("<table>", '<div class="scroll"><table>').replace("</table>", "</table></div>"))


def _write(content: bytes, file: BinaryIO) -> None:
    file.write(content)
