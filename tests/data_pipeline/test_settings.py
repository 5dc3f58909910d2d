"""Settings: every mistake is one clear line that names the key, and what is read is what was written."""

from pathlib import Path
from typing import Literal

import pydantic
import pytest
import yaml

import configs
from data_pipeline.settings import (
    Settings,
    UsageError,
    describe,
    load_settings,
    read_yaml,
    require_file,
    to_yaml,
)
from data_pipeline.sources import DataSettings


class Schedule(Settings):
    learning_rate: float = pydantic.Field(1e-3, description="peak of the schedule")
    warmup_steps: pydantic.NonNegativeInt = pydantic.Field(0, description="linear warm-up")


class Entry(Settings):
    name: str = pydantic.Field(description="what it is called")
    weight: float = 1.0


class Run(Settings):
    seed: int = 0
    note: str | None = None
    mode: Literal["fast", "slow"] = "fast"
    schedule: Schedule = Schedule()
    entries: tuple[Entry, ...] = ()

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> "Run":
        if self.mode == "fast" and self.schedule.warmup_steps > 100:
            raise ValueError("mode=fast allows schedule.warmup_steps up to 100; set mode=slow")
        return self


@pytest.fixture
def load(tmp_path):
    def load_text(text, *overrides, settings=Run):
        (tmp_path / "run.yaml").write_text(text)
        return load_settings(settings, str(tmp_path / "run.yaml"), overrides)

    return load_text


def message_of(load, text, *overrides, settings=Run):
    with pytest.raises(UsageError) as caught:
        load(text, *overrides, settings=settings)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "wrong", "nearest"),
    [
        ("sead: 1", "sead", "seed"),
        ("schedule: {learning_rat: 1}", "schedule.learning_rat", "schedule.learning_rate"),
        ("schedule: {warmup: 1}", "schedule.warmup", "schedule.warmup_steps"),
        ("entries: [{name: a, wieght: 2}]", "entries.0.wieght", "entries.0.weight"),
        ("entries: [{name: a}, {name: b, wieght: 2}]", "entries.1.wieght", "entries.1.weight"),
    ],
)
def test_an_unknown_key_names_the_nearest_valid_one(load, text, wrong, nearest):
    assert message_of(load, text).endswith(f"unknown key {wrong}; did you mean {nearest}?")


def test_an_unknown_key_of_a_data_source_names_the_nearest_valid_one(load):
    text = "sources: [{task: demo, path: a}, {task: demo, paht: b}]"
    message = message_of(load, text, settings=DataSettings)
    assert message.endswith("unknown key sources.1.paht; did you mean sources.1.path?")


def test_a_key_that_resembles_nothing_gets_no_hint(load):
    assert message_of(load, "qqqqqqqq: 1").endswith("unknown key qqqqqqqq")


def test_each_of_several_mistakes_has_its_line(load):
    message = message_of(load, "sead: 1\nmode: quick\nschedule: {warmup_steps: -1}\nentries: [{weight: 2}]")
    heading, *lines = message.splitlines()
    assert heading.endswith("run.yaml:")
    assert len(lines) == 4
    for expected in (
        "unknown key sead; did you mean seed?",
        "mode='quick': Input should be 'fast' or 'slow'",
        "schedule.warmup_steps=-1: Input should be greater than or equal to 0",
        "entries.0.name is required",
    ):
        assert sum(line.strip() == expected for line in lines) == 1, expected


def test_a_contradiction_between_keys_is_told_in_its_own_words(load):
    message = message_of(load, "schedule: {warmup_steps: 200}")
    assert message.endswith("run.yaml: mode=fast allows schedule.warmup_steps up to 100; set mode=slow")


def test_a_float_without_a_dot_is_a_float_although_yaml_reads_text(load):
    assert yaml.safe_load("2e-5") == "2e-5", "PyYAML reads this as a number now: the claim is empty"
    assert load("schedule: {learning_rate: 2e-5}").schedule.learning_rate == 0.00002
    assert load("{}", "schedule.learning_rate=2e-5").schedule.learning_rate == 0.00002


def test_overrides_win_over_the_file_and_later_ones_over_earlier_ones(load):
    run = load("seed: 1\nnote: old", "seed=2", "seed=3", "schedule.warmup_steps=7")
    assert (run.seed, run.note, run.schedule.warmup_steps) == (3, "old", 7)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("note=a=b", {"note": "a=b"}),
        ("note=null", {"note": None}),
        ("note=", {"note": None}),
        ("--note=x", {"note": "x"}),
        ("entries=[{name: c}]", {"entries": (Entry(name="c"),)}),
        ("entries=[]", {"entries": ()}),
        ("entries.1.weight=0.5", {"entries": (Entry(name="a"), Entry(name="b", weight=0.5))}),
        ("entries.0={name: z, weight: 3}", {"entries": (Entry(name="z", weight=3), Entry(name="b"))}),
        ("schedule={warmup_steps: 9}", {"schedule": Schedule(warmup_steps=9)}),
    ],
)
def test_an_override_sets_exactly_the_key_it_names(load, override, expected):
    run = load("note: old\nentries: [{name: a}, {name: b}]", override)
    before = Run(note="old", entries=(Entry(name="a"), Entry(name="b")))
    assert dict(run) == dict(before) | expected


def test_an_override_reaches_into_the_data_sources(load):
    text = "sources: [{task: demo, path: a}, {task: demo, path: b}]"
    settings = load(text, "sources.0.path=other/file.jsonl", "context=64", settings=DataSettings)
    assert [source.path for source in settings.sources] == ["other/file.jsonl", "b"]
    assert settings.context == 64


def test_an_override_below_an_absent_or_null_key_makes_the_group(load):
    assert load("{}", "schedule.warmup_steps=3").schedule.warmup_steps == 3
    assert load("schedule: null", "schedule.warmup_steps=3").schedule.warmup_steps == 3


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed", "must look like key=value"),
        ("=3", "must look like key=value"),
        ("--=3", "must look like key=value"),
        ("seed.x=3", "seed is 1 and has no keys below it"),
        ("entries.0.name.x=3", "entries.0.name is 'a' and has no keys below it"),
        ("entries.2.name=x", "entries has entries 0 to 1"),
        ("entries.2={name: x}", "entries has entries 0 to 1"),
        ("entries.-1.name=x", "entries has entries 0 to 1"),
        ("entries.²=x", "entries has entries 0 to 1"),
        ("entries.first.name=x", "entries has entries 0 to 1"),
        ("note=[1", "not valid YAML"),
        ("note=2024-13-45", "not valid YAML"),
    ],
)
def test_an_override_that_cannot_be_applied_is_quoted_with_the_reason(load, override, said):
    message = message_of(load, "seed: 1\nentries: [{name: a}, {name: b}]", override)
    assert repr(override) in message and said in message


def test_a_missing_config_file_is_named():
    with pytest.raises(UsageError, match=r"'no/such/file\.yaml' does not exist"):
        load_settings(Run, "no/such/file.yaml")


@pytest.mark.parametrize(("text", "kind"), [("- a\n- b", "list"), ("seed", "str"), ("", "NoneType")])
def test_a_config_file_that_is_no_mapping_is_refused(load, text, kind):
    assert message_of(load, text).endswith(f"run.yaml must hold a mapping of settings, not {kind}")


@pytest.mark.parametrize("text", ["seed: [1", "a: b: c", "seed: 2024-13-45"])
def test_broken_yaml_names_its_file(load, text):
    assert "run.yaml is not valid YAML" in message_of(load, text)


def test_a_config_file_that_is_no_text_names_its_file(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00seed")
    with pytest.raises(UsageError, match=r"binary\.yaml is not valid YAML"):
        read_yaml(str(tmp_path / "binary.yaml"))


def test_a_folder_is_neither_a_config_nor_a_file(tmp_path):
    with pytest.raises(UsageError, match="is a folder, not a file"):
        read_yaml(str(tmp_path))
    with pytest.raises(UsageError, match=r"^corpus .* is a folder, not a file"):
        require_file(tmp_path, "corpus")


def test_resolved_settings_survive_being_written_and_read_back(load):
    run = load(
        "seed: 3\nnote: 'yes: \u2028 \"7\"'\nmode: slow\n"
        "schedule: {learning_rate: 2e-5, warmup_steps: 4000}\n"
        "entries: [{name: '1e5', weight: 0.1}, {name: 'null'}]"
    )
    assert run.entries[0].name == "1e5" and run.entries[1].name == "null"
    assert load(to_yaml(run)) == run
    data = DataSettings(sources=({"task": "demo", "path": "a"}, {"task": "gsm8k"}), context=77, layout="padded")
    assert load(to_yaml(data), settings=DataSettings) == data


def test_settings_cannot_be_changed_once_made():
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        Run().seed = 5


def test_packaged_configs_are_found_from_any_working_directory(tmp_path, monkeypatch):
    packaged = yaml.safe_load((Path(configs.__file__).parent / "demo.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    assert read_yaml("configs/demo.yaml") == packaged
    assert read_yaml("demo.yaml") == packaged


def test_a_file_that_is_here_wins_over_the_packaged_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("demo.yaml").write_text("seed: 12345")
    assert read_yaml("demo.yaml") == {"seed": 12345}


def test_help_shows_each_key_once_with_its_default_and_description():
    text = "\n".join(describe(Run))
    for line in ("seed (default: 0)", "schedule.learning_rate (default: 0.001)", "mode (default: fast)"):
        assert text.count(line) == 1
    assert "peak of the schedule" in text
    text = "\n".join(describe(DataSettings))
    for line in ("sources.0.task (required)", "sources.0.split (default: train)", "context (default: 2048)"):
        assert text.count(line) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sources: []", "sources: name at least one dataset"),
        ("sources: [{task: demo}]\ncontext: 0", "context=0: Input should be greater than 0"),
        ("sources: [{task: gsm9k}]", "sources.0.task='gsm9k': unknown task; allowed: gsm8k, math, svamp"),
        ("context: 5", "sources is required"),
    ],
)
def test_data_settings_that_cannot_be_meant_are_refused(load, text, said):
    assert said in message_of(load, text, settings=DataSettings)
