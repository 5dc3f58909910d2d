"""What a user can get wrong is said in one message with exit code 2, before any step."""

import shutil
from pathlib import Path

import pytest
from etils import epath
from small_run import run, write_config

from data_pipeline.settings import UsageError, load_settings
from mathscale_jax.config import OptimizerSettings, TrainSettings
from mathscale_jax.start import check_room
from mathscale_jax.train import train

CONFIGS = sorted(path.name for path in (Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["optimizer.learnig_rate=1"],
            "unknown key optimizer.learnig_rate; did you mean optimizer.learning_rate?",
        ),
        (["optimizer.learning_rate=fast"], "optimizer.learning_rate='fast'"),
        (["batch_size=0"], "batch_size=0"),
        (["compute.dtype=float16"], "compute.dtype='float16'"),
        (["num_epochs=2"], "give one of num_steps and num_epochs"),
        (["init_from=somewhere"], "give one of model (train from scratch) and init_from"),
        (["data.context=100"], "compute.loss_chunk=256 must divide data.context=100"),
        (["data.context=1024"], "data.context=1024 is longer than the model's max_context=512"),
        (["accumulation_steps=3"], "multiple of accumulation_steps=3"),
        (["mesh.data=3"], "does not divide the 8 cpu device(s)"),
        (["mesh.tensor=8", "mesh.fsdp=1"], "heads dimension of 4 cannot be split over mesh axis tensor of 8"),
        (["batch_size=4"], "cannot be split over mesh.data*mesh.fsdp=8"),
        (["model.vocab_size=330"], "340 pieces but the model's vocab_size is 330"),
        (["data.tokenizer=none.model"], "tokenizer 'none.model' does not exist"),
        (["data.sources.0.path=none.jsonl"], "data.sources.0.path='none.jsonl' does not exist"),
        (["data.sources.0.path=EMPTY"], "the dataset is empty"),
        (["data.overlong=refuse", "data.context=32", "compute.loss_chunk=32"], "longer than data.context=32"),
        (["data.context=32", "compute.loss_chunk=32"], "no example is left that fits data.context=32"),
        (["data.template=none.yaml"], "'none.yaml' does not exist"),
        (["model=null", "init_from=EMPTY"], "holds no finished step"),
        (["seed=4294967296"], "seed=4294967296"),
        (["output_dir=EMPTY"], "cannot be made"),
        (["batch_size"], "must look like key=value"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, overrides: list[str], told: str) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    config = write_config(tmp_path)
    with pytest.raises(UsageError) as refused:
        train(load_settings(TrainSettings, str(config), [o.replace("EMPTY", str(empty)) for o in overrides]))
    assert told in str(refused.value)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_command_prints_the_mistake_alone_and_exits_with_2(tmp_path: Path) -> None:
    result = run("mathscale_jax.train", "--config", str(write_config(tmp_path)), "model.num_layer=3")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and "did you mean model.num_layers?" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_help_lists_every_key_with_its_default() -> None:
    result = run("mathscale_jax.train", "--help")
    assert result.returncode == 0
    for text in (
        "optimizer.learning_rate (default: 2e-05)",
        "mesh.fsdp (default: -1)",
        "data.context (default: 2048)",
    ):
        assert text in result.stdout


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_valid_and_its_header_holds_its_command(name: str) -> None:
    settings = load_settings(TrainSettings, str(Path(__file__).parents[2] / "configs" / name))
    header = (Path(__file__).parents[2] / "configs" / name).read_text().partition("\n\n")[0]
    assert f"python -m mathscale_jax.train --config configs/{name}" in header
    assert settings.output_dir in header


def test_a_disk_without_room_for_one_checkpoint_is_said_before_any_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and two moments in float32 take 12 bytes a parameter, 8 with moments in bfloat16."""
    settings = load_settings(TrainSettings, str(write_config(tmp_path)), ["mesh.fsdp=8", "num_steps=1"])
    needed = 12 * settings.model.num_parameters
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(UsageError, match=r"output_dir=.* GB free, and one checkpoint .* takes 0\.0 GB"):
        train(settings)
    assert not (tmp_path / "run" / "checkpoints").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed * 8 // 12))
    narrow = settings.model_copy(update={"optimizer": OptimizerSettings(state_dtype="bfloat16")})
    check_room(epath.Path(tmp_path), narrow, narrow.model)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"lora": {"targets": ["attn"]}}, "attn match no matrix of the model; allowed: q_proj, k_proj"),
        ({"lora": {}}, "lora adapts trained weights: it needs init_from"),
        ({"lora": {"dropout": 1.0}}, "lora.dropout=1.0"),
        ({"validation": {"sources": []}}, "validation.sources"),
        ({"optimizer": {"state_dtype": "float16"}}, "optimizer.state_dtype='float16'"),
        ({"compute": {"remat": "some"}}, "compute.remat='some'"),
        ({"watchdog_minutes": 0}, "watchdog_minutes=0"),
    ],
)
def test_a_mistake_in_a_group_is_named(tmp_path: Path, changes: dict, told: str) -> None:
    with pytest.raises(UsageError) as refused:
        load_settings(TrainSettings, str(write_config(tmp_path, **changes)))
    assert told in str(refused.value)
