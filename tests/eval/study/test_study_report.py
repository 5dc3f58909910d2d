"""The report of a study against numbers computed by hand from the grades of its cells."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from etils import epath

from data_pipeline.settings import UsageError, validated
from eval.study.cells import stages_of
from eval.study.grid import Cell, cells_of
from eval.study.record import begin_record, mark_done
from eval.study.report import write_study_report
from eval.study.settings import StudySettings

STEPS = [2, 2, 2, 3, 3, 3]  # of the six problems
# Right samples of 4, of each problem: data, size, seed -> counts.
RIGHT = {
    ("plain", 10, 0): [0, 1, 1, 0, 1, 1], ("plain", 10, 1): [1, 1, 1, 0, 0, 0],
    ("plain", 20, 0): [2, 2, 2, 1, 1, 1], ("plain", 20, 1): [3, 2, 2, 1, 1, 1],
    ("plain", 80, 0): [4, 4, 4, 2, 2, 2], ("plain", 80, 1): [4, 3, 3, 3, 2, 2],
    ("long", 10, 0): [0, 1, 1, 2, 3, 3], ("long", 10, 1): [1, 1, 1, 2, 2, 2],
    ("long", 20, 0): [2, 2, 2, 3, 3, 3], ("long", 20, 1): [3, 2, 2, 3, 3, 3],
    ("long", 80, 0): [4, 4, 4, 4, 4, 4], ("long", 80, 1): [4, 3, 3, 4, 4, 4],
}  # fmt: skip


def study(folder: Path, **changes: Any) -> StudySettings:
    tree: dict[str, Any] = {
        "out": str(folder / "s"), "title": "Title", "about": "About <b>it</b>.", "scale": "Small.",
        "train": {
            "model": {"preset": "demo"}, "batch_size": 2, "num_epochs": 3,
            "data": {"sources": [{"task": "demo", "path": "a"}], "tokenizer": "t", "context": 256},
        },
        "axes": {
            "data": {"plain": {}, "long": {"data.sources.0.resample": {"power": 1}}},
            "size": {"data.sources.0.count": [10, 20, 80]},
        },
        "seeds": [0, 1],
        "evals": {"samples": {"task": "demo", "num_samples": 4}},
        "report": {
            "x": "size", "metrics": ["samples:pass_ratio", "samples:pass@4", "samples:pass@2"], "step_law": "samples",
            "contrasts": [
                {"axis": "data", "first": "plain", "second": "long", "metric": "samples:pass_ratio", "by": "steps"}
            ],
            "published": ["table_1"],
        },
        **changes,
    }  # fmt: skip
    return validated(StudySettings, tree, "study")


def finish(
    cell: Cell, settings: StudySettings, right: list[int], num_steps: list[int] | None = None, **more: Any
) -> None:
    """Writes what the commands of a cell would have left, with `right` samples right of each problem."""
    folder, out = Path(cell.folder), Path(cell.evals["samples"].out)
    (out / "grades").mkdir(parents=True)
    (folder / "train").mkdir()
    (folder / "train" / "metrics.jsonl").write_text('{"step": 7, "loss": 0.5}\n')
    problems = [
        {"problem_id": f"p{i}", "question": "?", "answer": "1", "num_steps": steps}
        for i, steps in enumerate(num_steps or STEPS)
    ]
    grades = [
        {"problem_id": f"p{i}", "sample_id": s, "answer": "1", "correct": s < count, "vote": "1" if s < count else "2"}
        for i, count in enumerate(right)
        for s in range(4)
    ]
    for name, rows in (("problems.jsonl", problems), ("grades/part-0-5.jsonl", grades)):
        (out / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = {
        "complete": True,
        "grader_version": "2",
        "num_samples": 4,
        "step_law": None,
        "truncated_fraction": 0.0,
        **more,
    }
    (out / "metrics.json").write_text(json.dumps(metrics))
    begin_record(cell)
    for stage in stages_of(cell, settings):
        mark_done(cell, stage.name, 60.0)


@pytest.fixture
def finished(tmp_path: Path) -> StudySettings:
    settings = study(tmp_path)
    for cell in cells_of(settings):
        finish(cell, settings, RIGHT[cell.point["data"], int(cell.point["size"]), cell.seed])
    return settings


def numbers(settings: StudySettings) -> dict[str, Any]:
    write_study_report(settings, cells_of(settings))
    return json.loads((epath.Path(settings.out) / "study.json").read_text())


def test_values_are_means_over_seeds_of_means_over_problems(finished: StudySettings) -> None:
    told = numbers(finished)
    assert told["complete"] is True
    for point in told["points"]:
        counts = np.array([RIGHT[point["axes"]["data"], int(point["axes"]["size"]), seed] for seed in (0, 1)])
        measured = point["metrics"]
        assert measured["samples:pass_ratio"]["value"] == pytest.approx(counts.mean() / 4)
        assert measured["samples:pass_ratio"]["by_seed"]["1"] == pytest.approx(counts[1].mean() / 4)
        assert measured["samples:pass@4"]["value"] == pytest.approx((counts > 0).mean())
        of_two = 1 - scipy.special.comb(4 - counts, 2) / 6
        assert measured["samples:pass@2"]["value"] == pytest.approx(of_two.mean())
        assert point["steps"] == [7, 7]


def test_the_slope_is_that_of_the_means_and_its_interval_that_of_both_chances(finished: StudySettings) -> None:
    fit = numbers(finished)["fits"]["samples:pass_ratio"]["plain"]
    counts = np.array([[RIGHT["plain", size, seed] for seed in (0, 1)] for size in (10, 20, 80)]) / 4
    logs = np.log2([10, 20, 80])
    assert fit["per_doubling"]["value"] == pytest.approx(np.polyfit(logs, counts.mean(axis=(1, 2)), 1)[0])
    of_problem = [np.polyfit(logs, counts[:, :, p].mean(axis=1), 1)[0] for p in range(6)]
    of_seed = [np.polyfit(logs, counts[:, s].mean(axis=1), 1)[0] for s in range(2)]
    a, b = np.var(of_problem, ddof=1) / 6, np.var(of_seed, ddof=1) / 2
    half = scipy.stats.t.ppf(0.975, (a + b) ** 2 / (a**2 / 5 + b**2)) * np.sqrt(a + b)
    low, high = fit["per_doubling"]["ci95"]
    assert high - low == pytest.approx(2 * half)


def test_differences_are_paired_and_told_by_groups_of_steps(finished: StudySettings) -> None:
    rows = {(row["where"], row["group"]): row for row in numbers(finished)["contrasts"]}
    assert {where for where, _ in rows} == {"10", "20", "80", "all together"}
    assert {group for _, group in rows} == {"all", "2 steps", "3 steps"}
    short, long = rows["10", "2 steps"], rows["10", "3 steps"]
    assert short["num_problems"] == long["num_problems"] == 3
    assert short["difference"]["ci95"] is None  # of three problems
    assert short["difference"]["value"] == 0  # resampling changed nothing there
    assert long["difference"]["value"] == pytest.approx(np.mean([[2, 2, 2], [2, 2, 2]]) / 4)
    every = [rows[str(size), "all"]["difference"]["value"] for size in (10, 20, 80)]
    assert rows["all together", "all"]["difference"]["value"] == pytest.approx(np.mean(every))


def test_the_pages_say_what_is_published_what_is_ours_and_by_which_rule(finished: StudySettings) -> None:
    numbers(finished)
    out = Path(finished.out)
    text, page = (out / "report.md").read_text(), (out / "report.html").read_text()
    assert "every run takes 3 epochs of its data" in text and "2 seeds" in text
    assert "## Measured here" in text and "## Published: real against synthetic data" in text
    assert "| 7.5K | 50.2 | 49.5 | 8.4 | 7.9 |" in text
    plain = np.mean([RIGHT["plain", 80, seed] for seed in (0, 1)])
    assert f"| plain | 80 | {25 * plain:.1f} [" in text
    assert f"| long_80_seed1 | 7 | 2.0 | {25 * np.mean(RIGHT['long', 80, 1]):.1f} | 100.0 | 100.0 |" in text
    (line,) = [line for line in text.splitlines() if line.startswith("- PassRatio@4 (plain)")]
    counts = [np.mean([RIGHT["plain", size, seed] for seed in (0, 1)]) / 4 for size in (10, 20, 80)]
    slope = np.polyfit(np.log2([10, 20, 80]), counts, 1)[0]
    assert f"{100 * slope:+.1f} [" in line and "points for each doubling" in line
    assert "&lt;b&gt;it" in page and "<b>it" not in page
    assert "Of the 12 differences above, 0.6 would have one by chance" in text  # 4 places x 3 groups
    assert page.count("data:image/svg+xml;base64,") == 1 and (out / "metrics.png").read_bytes()[:4] == b"\x89PNG"
    assert not (out / "step_law.png").exists()  # two problems of each number of steps are no points


def test_a_study_under_way_says_so(tmp_path: Path) -> None:
    settings = study(tmp_path)
    first = cells_of(settings)[0]
    finish(first, settings, [1, 1, 1, 1, 2, 2])
    assert numbers(settings)["complete"] is False
    text = (tmp_path / "s" / "report.md").read_text()
    assert "**Unfinished.** 1 of 12 cells are done" in text
    assert "**Failed.**" not in text
    write_study_report(
        settings, cells_of(settings), [(cells_of(settings)[1], "training ended with 1\n  its last line")]
    )
    text = (tmp_path / "s" / "report.md").read_text()
    assert "**Failed.** 1 of 12 cells" in text and "- plain_10_seed1: training ended with 1\n" in text


def test_the_step_law_is_told_with_how_well_it_fits(tmp_path: Path) -> None:
    settings = study(tmp_path, seeds=[0], axes={"size": {"data.sources.0.count": [10, 20]}}, report={
        "x": "size", "metrics": ["samples:pass_ratio"], "step_law": "samples",
    })  # fmt: skip
    lawful, lawless = cells_of(settings)
    steps = [2] * 6 + [3] * 6
    finish(lawful, settings, [2, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], steps)  # a quarter and an eighth: 1/2 ^ steps
    finish(lawless, settings, [0] * 6 + [4] * 6, steps)
    numbers(settings)
    text = (tmp_path / "s" / "report.md").read_text()
    rows = [line.split(" | ") for line in text.partition("## Step law")[2].splitlines() if line.startswith("| ")]
    assert rows[0][4:] == ["not ruled out by", "by 2 steps", "by 3 steps |"]
    first, second = rows[2:4]
    assert first[1].startswith("0.500 [") and first[3:] == ["0.0", "2 of 2 points", "0.50", "0.50 |"]
    assert second[4:] == ["0 of 2 points", "0.00", "1.00 |"] and float(second[3]) > 40
    assert (tmp_path / "s" / "step_law.png").exists()


def test_samples_that_were_cut_off_are_told(tmp_path: Path) -> None:
    settings = study(tmp_path, seeds=[0])
    for cell, cut in zip(cells_of(settings), (0.0, 0.25, 0.125, 0.0, 0.0, 0.0), strict=True):
        finish(cell, settings, [1, 1, 1, 1, 2, 2], truncated_fraction=cut)
    numbers(settings)
    text = (tmp_path / "s" / "report.md").read_text()
    assert "cut off at max_tokens in 2 of 6 runs, most often in plain_20_seed0 (25 % of the samples)" in text


def test_two_sizes_are_not_fitted_and_the_report_says_why(tmp_path: Path) -> None:
    axes = {"data": {"plain": {}, "long": {"batch_size": 4}}, "size": {"data.sources.0.count": [10, 20]}}
    settings = study(tmp_path, axes=axes)
    for cell in cells_of(settings):
        finish(cell, settings, RIGHT[cell.point["data"], int(cell.point["size"]), cell.seed])
    numbers(settings)
    text = (tmp_path / "s" / "report.md").read_text()
    assert "No fit over size" in text and "Over the logarithm" not in text and "dotted lines" not in text


def test_losses_of_the_leakage_check_and_their_differences(tmp_path: Path) -> None:
    d1 = {("clean", 0): 0.02, ("clean", 1): 0.04, ("leaked", 0): -0.10, ("leaked", 1): -0.16}
    settings = study(
        tmp_path,
        axes={"data": {"clean": {}, "leaked": {"batch_size": 4}}},
        leakage={"test": "a", "new": "b", "train": "c"},
        report={
            "x": "data",
            "metrics": ["leakage:d1", "leakage:test"],
            "contrasts": [{"axis": "data", "first": "clean", "second": "leaked", "metric": "leakage:d1"}],
        },
    )
    error = 0.01
    ends = lambda value: {"value": value, "ci95": [value - 1.959964 * error, value + 1.959964 * error]}  # noqa: E731
    for cell in cells_of(settings):
        finish(cell, settings, [1, 1, 1, 1, 2, 2])
        told = {"d1": ends(d1[cell.point["data"], cell.seed]), "loss": {"test": ends(0.5 + cell.seed)}}
        (Path(cell.folder) / "leakage.json").write_text(json.dumps(told))
    told = numbers(settings)
    assert told["points"][0]["metrics"]["leakage:test"]["value"] == pytest.approx(1.0)
    (row,) = told["contrasts"]
    assert row["difference"]["value"] == pytest.approx((-0.12 - 0.20) / 2)
    of_examples, of_seeds = 2 * error**2, np.var([-0.12, -0.20], ddof=1) / 2
    freedom = (of_examples + of_seeds) ** 2 / of_seeds**2
    half = scipy.stats.t.ppf(0.975, freedom) * np.sqrt(of_examples + of_seeds)
    assert row["difference"]["ci95"] == pytest.approx([-0.16 - half, -0.16 + half], abs=1e-6)
    text = (tmp_path / "s" / "report.md").read_text()
    assert f"| +0.030 | -0.130 | -0.160 [{-0.16 - half:+.3f}, {-0.16 + half:+.3f}] |" in text
    assert "| clean | +0.030 [" in text and "1.000 [" in text


def test_errors_count_as_shares_of_all_samples(tmp_path: Path) -> None:
    metrics = ["samples:calculation_errors", "samples:reasoning_errors", "samples:calculation_share"]
    settings = study(tmp_path, errors=["samples"], report={"x": "size", "metrics": metrics}, seeds=[0])
    cell = cells_of(settings)[0]
    ratio = {"4": {"value": 0.75, "ci95": [0.75, 0.75]}}
    finish(cell, settings, [3] * 6, pass_ratio=ratio)
    out = Path(cell.evals["samples"].out)
    shares = {"calculation": {"value": 0.4, "ci95": [0.2, 0.6]}, "reasoning": {"value": 0.6, "ci95": [0.4, 0.8]}}
    program = {"shares": shares, "num_wrong": 10, "not_checkable": 2}  # so that 4 of 5 were checked
    digest = hashlib.sha256((out / "metrics.json").read_bytes()).hexdigest()
    (out / "errors.json").write_text(json.dumps({"metrics_sha256": digest, "program": program}))
    measured = numbers(settings)["points"][0]["metrics"]
    assert measured["samples:calculation_errors"]["value"] == pytest.approx(0.25 * 0.8 * 0.4)
    assert measured["samples:calculation_errors"]["ci95"] == pytest.approx([0.25 * 0.8 * 0.2, 0.25 * 0.8 * 0.6])
    assert measured["samples:reasoning_errors"]["value"] == pytest.approx(0.25 * 0.8 * 0.6)
    assert measured["samples:calculation_share"]["ci95"] == pytest.approx([0.2, 0.6])


def test_pass_at_more_samples_than_were_drawn_is_refused(tmp_path: Path) -> None:
    settings = study(tmp_path, report={"x": "size", "metrics": ["samples:pass@8"]})
    with pytest.raises(UsageError, match="'samples' draws 4 samples a problem"):
        cells_of(settings)


def test_a_seed_that_one_side_lacks_is_left_out_of_both(tmp_path: Path) -> None:
    settings = study(tmp_path)
    cells = cells_of(settings)
    for cell in cells:
        key = cell.point["data"], int(cell.point["size"]), cell.seed
        if key not in {("long", 10, 1), ("plain", 20, 0), ("long", 20, 1)}:  # of size 20 no seed is common
            finish(cell, settings, RIGHT[key])
    rows = {(row["where"], row["group"]): row for row in numbers(settings)["contrasts"]}
    alone = rows["10", "all"]
    assert alone["first_value"] == pytest.approx(np.mean(RIGHT["plain", 10, 0]) / 4)
    assert alone["difference"]["value"] == pytest.approx(alone["second_value"] - alone["first_value"])
    assert ("20", "all") not in rows and rows["all together", "all"]["difference"]["by_seed"].keys() == {"0"}
    assert "nan" not in (tmp_path / "s" / "report.md").read_text()


def test_runs_of_other_problems_are_not_put_side_by_side(finished: StudySettings) -> None:
    out = Path(cells_of(finished)[-1].evals["samples"].out)
    problems = out / "problems.jsonl"
    problems.write_text(problems.read_text().replace('"?"', '"!"'))
    with pytest.raises(UsageError, match="do not hold the same problems"):
        numbers(finished)
