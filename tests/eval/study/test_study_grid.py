"""The cells of a study: what is in a grid, and which grids cannot be meant."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipeline.settings import UsageError, validated
from eval.study.grid import cells_of
from eval.study.settings import _METRIC as METRIC
from eval.study.settings import StudySettings, load_study, published_tables

CONFIGS = sorted(Path("configs/studies").glob("*.yaml"))
COUNT = "data.sources.0.count"
STUDIES = [path for path in CONFIGS if path.name not in ("published.yaml", "demo_common.yaml")]


def study(**changes: Any) -> StudySettings:
    tree: dict[str, Any] = {
        "out": "runs/s",
        "title": "T",
        "scale": "small",
        "train": {
            "model": {"preset": "demo"},
            "data": {"sources": [{"task": "demo", "path": "{out}/a.jsonl"}], "tokenizer": "t.model", "context": 256},
            "batch_size": 2,
            "num_steps": 3,
        },
        "axes": {
            "data": {"plain": {}, "long": {"data.sources.0.resample": {"power": 1}}},
            "size": {"data.sources.0.count": [10, 20]},
        },
        "seeds": [0, 5],
        "evals": {"samples": {"task": "demo", "source": "{out}/test.jsonl", "num_samples": 4}},
        "report": {"x": "size", "metrics": ["samples:pass_ratio"]},
        **changes,
    }
    return validated(StudySettings, tree, "study")


def test_the_grid_is_every_combination_with_every_seed() -> None:
    cells = cells_of(study())
    assert [cell.name for cell in cells] == [
        f"{data}_{size}_seed{seed}" for data in ("plain", "long") for size in (10, 20) for seed in (0, 5)
    ]
    last = cells[-1]
    assert last.point == {"data": "long", "size": "20"} and last.seed == 5
    assert last.train.seed == last.train.data.seed == last.evals["samples"].seed == 5
    (source,) = last.train.data.sources
    assert source.path == "runs/s/a.jsonl" and source.count == 20
    assert source.resample is not None and source.resample.power == 1
    assert last.train.output_dir == "runs/s/cells/long_20_seed5/train" == last.evals["samples"].checkpoint
    assert last.evals["samples"].out == "runs/s/cells/long_20_seed5/samples"
    (plain,) = cells[0].train.data.sources
    assert plain.resample is None and plain.count == 10


def test_a_study_adds_to_the_one_it_extends(tmp_path: Path) -> None:
    below, above = tmp_path / "below.yaml", tmp_path / "above.yaml"
    tree = study().model_dump(mode="json", exclude={"out", "axes"}) | {"eval_settings": {"max_tokens": 7}}
    below.write_text(yaml.safe_dump(tree | {"prepare": [{"makes": "a", "run": "x"}]}))
    above.write_text(
        yaml.safe_dump({
            "extends": str(below), "out": "o", "axes": {"size": {COUNT: [5]}}, "seeds": [3], "train": {"num_steps": 9},
            "prepare": [{"makes": "b", "run": "y"}],
            "evals": {"greedy": {"task": "demo", "temperature": 0, "num_samples": 1}},
        })
    )  # fmt: skip
    settings = load_study(str(above), ["title=Other"])
    assert [step.makes for step in settings.prepare] == ["a", "b"] and settings.title == "Other"
    (cell,) = cells_of(settings)
    assert (cell.seed, cell.train.num_steps, cell.train.batch_size) == (3, 9, 2)
    assert cell.evals.keys() == {"samples", "greedy"} and cell.evals["greedy"].max_tokens == 7


def test_what_is_extended_may_extend_and_not_itself(tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.yaml" for name in "abc"}
    files["a"].write_text(yaml.safe_dump({"seeds": [4], "train": {"log_every": 7}}))
    files["b"].write_text(yaml.safe_dump({"extends": str(files["a"]), "train": {"num_steps": 9}}))
    tree = study().model_dump(mode="json") | {"extends": str(files["b"])}
    del tree["seeds"], tree["cells"]
    files["c"].write_text(yaml.safe_dump(tree))
    settings = load_study(str(files["c"]))
    assert settings.seeds == (4,) and settings.train["log_every"] == 7 and settings.train["num_steps"] == 3
    files["a"].write_text(yaml.safe_dump({"extends": str(files["b"])}))
    with pytest.raises(UsageError, match="extends itself"):
        load_study(str(files["c"]))
    files["a"].write_text("extends: 5")
    with pytest.raises(UsageError, match="extends=5: must be the path"):
        load_study(str(files["c"]))
    files["a"].write_text(yaml.safe_dump({"train": {1: 2}}))
    with pytest.raises(UsageError, match="train: 1 is no name of a setting"):
        load_study(str(files["c"]))


def test_cells_are_skipped_by_their_labels() -> None:
    cells = cells_of(study(skip=[{"data": "plain", "size": 20}]))
    assert {cell.name for cell in cells} == {
        f"{name}_seed{seed}" for name in ("plain_10", "long_10", "long_20") for seed in (0, 5)
    }


def test_a_base_config_is_changed_where_the_study_says_so(tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    base.write_text(yaml.safe_dump({"batch_size": 8, "num_epochs": 3, "optimizer": {"learning_rate": 1e-3}}))
    changes = study().train | {"num_steps": None, "batch_size": 8, "optimizer.clip_norm": 0.5}
    (cell, *_) = cells_of(study(base=str(base), train=changes))
    assert (cell.train.batch_size, cell.train.num_epochs) == (8, 3)
    assert (cell.train.optimizer.learning_rate, cell.train.optimizer.clip_norm) == (1e-3, 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axes": {}}, "axes: name at least one"),
        ({"seeds": [1, 1]}, "one is there twice"),
        ({"axes": {"size": {"data.sources.0.count": [10, 10]}}}, "axes.size: 10 is there twice"),
        ({"axes": {"size": [10, 20]}}, "axes.size"),
        ({"axes": {"size": {f"train.{COUNT}": [10]}}}, f"axes.size: an axis sets settings of training: write {COUNT}"),
        ({"axes": {"size": {"small": 10}}}, "axes.size.small: write {KEY: [values]}"),
        ({"axes": {"size": {"a": {"batch_size": 4}, "b": {"batch_size": 4}}}}, "between a and b. It sets batch_size:"),
        ({"axes": {"size": {"data.seed": [1, 2]}}}, "axes.size: data.seed is said by the study: name seeds"),
        ({"train": {"data": {"seed": 3}}}, "train.data.seed is said by the study: name seeds"),
        ({"train": {"output_dir": "x"}}, "train.output_dir is said by the study: name out"),
        ({"axes": {"size": {COUNT: [10]}, "b": {COUNT: [20]}}}, f"axes.b sets {COUNT} and so undoes what axes.size"),
        ({"axes": {"size": {COUNT: [10]}, "data": {"x": {"data.sources": []}}}}, "the whole comes first"),
        ({"axes": {"size": {"x/y": {"batch_size": 4}, "x y": {"batch_size": 8}}}}, "would share the folder"),
        ({"axes": {"size": {"batch_sizes": [10]}}}, "unknown key batch_sizes; did you mean batch_size?"),
        ({"axes": {"size": {"data.sources.3.count": [10]}}}, "has entries 0 to 0"),
        ({"axes": {"size": {"batch_size": [-1]}}}, "cell -1_seed0: batch_size=-1"),
        ({"skip": [{"sizes": 10}]}, "skip.0: 'sizes' is none of axes: data, size"),
        ({"skip": [{"size": 11}]}, "skip.0.size=11 is none of 10, 20"),
        ({"skip": [{"size": 10}, {"size": 20}]}, "skip leaves no cell"),
        ({"evals": {}}, "say what is measured"),
        ({"evals": {"samples": {"task": "demo", "num_sample": 3}}}, "key num_sample; did you mean num_samples?"),
        ({"evals": {"samples": {"task": "demo", "out": "x"}}}, "evals.samples.out is said by the study"),
        ({"errors": ["greedy"]}, "errors: 'greedy' is none of evals: samples"),
        ({"report": {"x": "sizes", "metrics": ["samples:pass_ratio"]}}, "report.x='sizes' is none of axes: data, size"),
        ({"report": {"x": "size", "metrics": ["samples:passratio"]}}, "'samples:passratio' is no metric"),
        ({"report": {"x": "size", "metrics": ["greedy:accuracy"]}}, "'greedy' is none of the graded evals: samples"),
        ({"report": {"x": "size", "metrics": ["samples:calculation_errors"]}}, "needs 'samples' in errors"),
        ({"report": {"x": "size", "metrics": ["leakage:d1"]}}, "report.metrics: leakage:d1 needs the settings"),
        ({"report": {"x": "size", "metrics": ["samples:pass_ratio"], "published": ["table_9"]}}, "'table_9' is not in"),
        ({"leakage": {"test": "a", "new": "b"}}, "leakage: train is required"),
        ({"evals": {"samples": {"task": "gsm9k"}}}, "task='gsm9k' is unknown; allowed: gsm8k"),
        ({"evals": {"train": {"task": "demo"}}}, "neither train nor leakage"),
        ({"evals": {"a b": {"task": "demo"}}}, "evals: 'a b' must be a word"),
        ({"report": {"x": "size", "metrics": ["samples:pass@0"]}}, "is no metric"),
        ({"report": {"x": "size", "metrics": ["samples:pass@5"]}}, "'samples' draws 4 samples a problem"),
        ({"report": {"x": "size", "metrics": ["samples:accuracy"]}}, "say samples:pass_ratio"),
        ({"train": {1: 2}}, "train.1.[key]=1: Input should be a valid string"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_one_clear_message(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        cells_of(study(**changes))
    assert message in str(raised.value)


@pytest.mark.parametrize("contrast, message", [
    ({"axis": "model"}, "contrasts.0.axis='model' is none of axes"),
    ({"second": "short"}, "'short' is none of axes.data: plain, long"),
    ({"metric": "samples:step_accuracy"}, "differences are of accuracy, pass_ratio, pass@K"),
    ({"metric": "leakage:d3"}, "differences are of accuracy, pass_ratio, pass@K, leakage"),
    ({"metric": "leakage:d1", "by": "steps"}, "contrasts.0.by='steps': losses are not known by groups"),
])  # fmt: skip
def test_contrasts_that_cannot_be_meant(contrast: dict[str, str], message: str) -> None:
    whole = {"axis": "data", "first": "plain", "second": "long", "metric": "samples:pass_ratio", **contrast}
    leakage = {"test": "a", "new": "b", "train": "c"}
    with pytest.raises(UsageError) as raised:
        study(leakage=leakage, report={"x": "size", "metrics": ["samples:pass_ratio"], "contrasts": [whole]})
    assert message in str(raised.value)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_of_ours_is_a_grid_that_can_be_meant(path: Path) -> None:
    settings = load_study(str(path))
    assert cells_of(settings) and settings.scale and settings.about
    head = path.read_text().split("\n\n")[0]
    assert f"python -m eval study --config {path}" in head.replace("\\\n#  ", "")
    assert settings.report.published and published_tables(settings.report.published)


def test_a_setting_of_training_is_pointed_to_its_place() -> None:
    with pytest.raises(UsageError, match=r"for its training runs: train\.num_steps=5"):
        load_study("configs/studies/scaling_demo.yaml", ["num_steps=5"])
    assert load_study("configs/studies/scaling_demo.yaml", ["train.num_steps=5"]).train["num_steps"] == 5
    with pytest.raises(UsageError, match="did you mean seeds"):
        load_study("configs/studies/scaling_demo.yaml", ["seed=5"])


def test_every_paper_study_has_its_demo() -> None:
    names = {path.stem for path in STUDIES}
    papers = {name for name in names if not name.endswith("_demo")}
    assert papers and {f"{name}_demo" for name in papers} == names - papers


def test_published_tables_are_rectangles_of_what_the_papers_print() -> None:
    tables = yaml.safe_load(Path("configs/studies/published.yaml").read_text())
    assert published_tables(list(tables))
    assert all(len(row) == len(table["columns"]) for table in tables.values() for row in table["rows"])
    numbers = {
        name: [float(value) for row in table["rows"] for value in row if re.fullmatch(r"[\d.]+", str(value))]
        for name, table in tables.items()
    }
    assert numbers == {
        "table_1": [26.7, 25.9, 4.2, 3.9, 32.8, 31.9, 5.6, 4.9, 43.3, 42.2, 6.6, 6.0, 50.2, 49.5, 8.4, 7.9],
        "figure_1": [48.2, 97.7, 7.9, 72.0],
        "table_2": [82.6, 40.6, 89.2, 43.7, 84.2, 47.2, 88.1, 44.9, 90.6, 52.8],
        "table_3": [22, 51, 59, 65, 68],
        "figure_6": [],
        "table_5": [28.9, 28.1, 37.6, 36.6],
        "table_4": [78.9, 67.1, 89.7, 83.9, 94.2, 90.9],
        "resampling": [71.1, 72.8],
        "figure_5": [],
        "table_6": [0.02, 0.19, 0.01, 0.20],
        "puzzles": [44, 33, 35],
    }
    assert METRIC.fullmatch("samples:pass@256") and not METRIC.fullmatch("samples:pass@")
