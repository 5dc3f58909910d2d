"""What `inspect` shows is what the model sees: its trained spans are the response and EOS, nothing else."""

import json
import re

import pytest

from data_pipeline.__main__ import main
from data_pipeline.inspecting import InspectSettings, examples_of, inspect
from data_pipeline.loader import Batches
from data_pipeline.settings import UsageError
from data_pipeline.templates import Template

pytestmark = pytest.mark.usefixtures("logging_left_as_it_was")


@pytest.fixture
def config(tmp_path, write_rows, small_tokenizer):
    """A training config over rows with one to three steps; the rest of it is none of the data pipeline's business."""
    rows = [
        {"question": f"Ann has {i} pens?", "solution": "\n".join([f"{i} + 1 = {i + 1}"] * (1 + i % 3)), "answer": i + 1}
        for i in range(30)
    ]
    (tmp_path / "tokenizer.model").write_bytes(small_tokenizer.model)
    data = {
        "sources": [{"task": "jsonl", "path": write_rows(*rows), "name": "pens"}],
        "tokenizer": str(tmp_path / "tokenizer.model"), "context": 256, "cache_dir": str(tmp_path / "cache"),
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(json.dumps({"data": data, "num_steps": 3, "model": {"anything": 1}}))
    return str(tmp_path / "config.yaml")


def test_the_green_spans_are_the_response_and_its_end(config, small_tokenizer):
    epoch = inspect(InspectSettings(config=config, rows=0))
    from data_pipeline.sources import DataSettings

    batches = Batches(
        epoch.rows, DataSettings(sources=[{"task": "jsonl"}], context=256), batch_size=1, seed=0, num_epochs=1
    )
    seen = 0
    for batch in batches:
        for text in examples_of(batch, 0, small_tokenizer):
            green = "".join(text.plain[span.start : span.end] for span in text.spans if span.style == "green")
            dim = "".join(text.plain[span.start : span.end] for span in text.spans if span.style == "dim")
            number = int(re.search(r"Ann has (\d+) pens", dim)[1])
            steps = "\n".join([f"{number} + 1 = {number + 1}"] * (1 + number % 3))
            assert dim == "[<s>]" + Template().render_prompt(f"Ann has {number} pens?")
            assert green == Template().render_response(steps, str(number + 1)) + "[</s>]"
            seen += 1
    assert seen == 30


def test_the_command_shows_datasets_histograms_and_rows_and_writes_a_page(config, tmp_path, capsys):
    argv = ["inspect", "--config", config, "--rows", "1", "--html", str(tmp_path / "page.html")]
    with pytest.raises(SystemExit) as caught:
        main([*argv, "data.sources.0.resample.power=2", "data.sources.0.resample.min_bin=1"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    for said in ("pens", "30 examples in", "% filled", "effective sample size", "before", "row 1 of", "The answer is:"):
        assert said in out, said
    page = (tmp_path / "page.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and "The answer is:" in page and "color: #008000" in page


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.tokenizer=null"], "add data.tokenizer=FILE"),
        (["data.contxt=5"], "did you mean context"),
        (["data=null"], "has no group `data`"),
        (["data.sources.7.weight=1"], "has entries 0 to 0"),
    ],
)
def test_what_cannot_be_shown_is_one_message(config, overrides, said):
    with pytest.raises(UsageError) as caught:
        inspect(InspectSettings(config=config), overrides)
    assert said in str(caught.value)
