"""Hugging Face folders come in and go out bit for bit; what is wrong with one is said in one message."""

import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from data_pipeline.cli import RunError
from data_pipeline.files import locked
from data_pipeline.settings import UsageError
from data_pipeline.tokenizer import Tokenizer, train_tokenizer
from mathscale_jax.checkpoint import open_checkpoint
from mathscale_jax.checkpoint_lazy import LazyReader
from mathscale_jax.convert import exporting
from mathscale_jax.convert.configs import model_config_from_hf
from mathscale_jax.convert.exporting import export_hf
from mathscale_jax.convert.importing import import_weights
from mathscale_jax.convert.tokenizer_files import fast_tokenizer

TEXTS = [
    "a small corpus of words, digits 0123456789 and signs + - * / = ( )",
    "enough of it for some merges of letters",
]


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    file.write_bytes(train_tokenizer(TEXTS, vocab_size=320).model)
    return file


@pytest.fixture(params=["llama_gqa", "mistral_window"])
def source(request: pytest.FixtureRequest, golden: Path, tokenizer_file: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    shutil.copytree(golden / request.param, folder)
    shutil.copy(tokenizer_file, folder)
    return folder


def convert(source: Path, destination: Path, **options: str | None) -> None:
    import_weights(str(source), str(destination), **options)


def test_import_then_export_gives_back_every_tensor_bit_for_bit(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "checkpoint")
    export_hf(str(tmp_path / "checkpoint"), str(tmp_path / "out"))
    before = safetensors.numpy.load_file(source / "model.safetensors")
    after = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype == "bfloat16"
        assert np.array_equal(tensor.view(np.uint16), after[name].view(np.uint16)), name
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()


def test_what_lies_in_many_chunks_comes_back_bit_for_bit(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the vocabulary of a 7B model does: each parameter is read in several pieces."""
    monkeypatch.setattr("mathscale_jax.checkpoint._CHUNK_BYTES", 16_000)
    convert(source, tmp_path / "checkpoint")
    checkpoint = open_checkpoint(str(tmp_path / "checkpoint"))
    assert sum(1 for _ in LazyReader(checkpoint).pieces("embedding")) > 1
    export_hf(str(tmp_path / "checkpoint"), str(tmp_path / "out"))
    before, after = (safetensors.numpy.load_file(path / "model.safetensors") for path in (source, tmp_path / "out"))
    for name, tensor in before.items():
        assert np.array_equal(tensor.view(np.uint16), after[name].view(np.uint16)), name


def test_the_exported_config_says_what_the_source_said(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "checkpoint")
    export_hf(str(tmp_path / "checkpoint"), str(tmp_path / "out"))
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out"))
    assert model_config_from_hf(before, "") == model_config_from_hf(after, "")
    for key in (
        "model_type",
        "architectures",
        "vocab_size",
        "num_key_value_heads",
        "rms_norm_eps",
        "head_dim",
        "dtype",
    ):
        assert before[key] == after[key], key
    assert before.get("sliding_window") == after.get("sliding_window")


def test_several_shards_are_read_and_written(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "MAX_SHARD_BYTES", 50_000)
    convert(source, tmp_path / "checkpoint")
    export_hf(str(tmp_path / "checkpoint"), str(tmp_path / "sharded"))
    assert len(list((tmp_path / "sharded").glob("model-*-of-*.safetensors"))) > 2
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(safetensors.numpy.load_file(source / "model.safetensors"))
    convert(tmp_path / "sharded", tmp_path / "again")
    for ours, theirs in zip(*(_leaves(tmp_path / name) for name in ("checkpoint", "again")), strict=True):
        assert np.array_equal(ours, theirs)


def _leaves(path: Path) -> list[np.ndarray]:
    import jax

    return [np.asarray(leaf) for leaf in jax.tree.leaves(open_checkpoint(str(path)).restore_params())]


def test_dtype_is_kept_or_changed_as_asked(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "kept")
    convert(source, tmp_path / "wide", dtype="float32")
    assert open_checkpoint(str(tmp_path / "kept")).stored_dtype() == "bfloat16"
    assert open_checkpoint(str(tmp_path / "wide")).stored_dtype() == "float32"


def test_what_float16_cannot_hold_is_refused_both_ways(source: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"

    def enlarge(tensors: dict[str, np.ndarray]) -> None:
        tensors[name][3, 4:6] = 70_000, -1e9

    _change_tensors(source, enlarge)
    told = rf"{name}: float16 ends at 65504 and cannot hold 2 of its values \(up to 9.98e\+08\)"
    with pytest.raises(UsageError, match=told):
        convert(source, tmp_path / "narrow", dtype="float16")
    convert(source, tmp_path / "checkpoint")
    with pytest.raises(UsageError, match=told):
        export_hf(str(tmp_path / "checkpoint"), str(tmp_path / "out"), dtype="float16")
    assert not (tmp_path / "out").exists()


def test_nan_is_named_by_its_tensor_and_nothing_is_written(source: Path, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"][3, 4:6] = np.nan
        tensors["lm_head.weight"][0, 0] = np.inf

    _change_tensors(source, spoil)
    with pytest.raises(UsageError) as caught:
        convert(source, tmp_path / "checkpoint")
    assert "lm_head.weight: 1\n  model.layers.0.mlp.up_proj.weight: 2\n" in str(caught.value)
    assert not (tmp_path / "checkpoint").exists()


def test_the_prompt_template_goes_out_and_comes_in_again(source: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text('prompt: "Q: {question}\\nA:"\nresponse: "{solution} = {answer}"\n')
    convert(source, tmp_path / "checkpoint", template=str(tmp_path / "mine.yaml"))
    export_hf(str(tmp_path / "checkpoint"), str(tmp_path / "out"))
    convert(tmp_path / "out", tmp_path / "again")
    templates = [open_checkpoint(str(tmp_path / name)).meta.template for name in ("checkpoint", "again")]
    assert templates[0] == templates[1] and templates[1].render_prompt("x") == "Q: x\nA:"


def test_a_folder_with_both_formats_is_read_as_hugging_faces(source: Path, tmp_path: Path) -> None:
    (source / "params.json").write_text('{"dim": 48}')
    (source / "consolidated.00.pth").write_bytes(b"")
    convert(source, tmp_path / "checkpoint")
    assert "Hugging Face safetensors" in open_checkpoint(str(tmp_path / "checkpoint")).meta.lineage


def test_published_tokenizer_files_travel(source: Path, tmp_path: Path) -> None:
    fast = fast_tokenizer(Tokenizer.load(str(source / "tokenizer.model")))
    assert fast is not None
    published = {
        "tokenizer.json": {**fast, "version": "as it was published"},
        "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer", "chat_template": "{{ x }}"},
        "special_tokens_map.json": {"bos_token": "<s>"},
    }
    for name, tree in published.items():
        (source / name).write_text(json.dumps(tree))
    (source / "chat_template.jinja").write_text("{{ x }}\n")
    convert(source, tmp_path / "checkpoint")
    export_hf(str(tmp_path / "checkpoint"), str(tmp_path / "out"))
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ x }}\n"
    assert {name: json.loads((tmp_path / "out" / name).read_text()) for name in published} == published


def test_a_destination_that_holds_something_is_refused(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "checkpoint")
    with pytest.raises(UsageError, match="already holds a checkpoint"):
        convert(source, tmp_path / "checkpoint")
    with pytest.raises(UsageError, match="exists: choose another folder"):
        export_hf(str(tmp_path / "checkpoint"), str(source))


def _truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _lie_about_an_offset(folder: Path) -> None:
    """A header whose tensors end behind the end of the file."""
    file = folder / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"][1])
    header[last]["data_offsets"][1] += 4096
    header[last]["shape"][0] += 4096 // (2 * int(np.prod(header[last]["shape"][1:])))
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def _lie_about_the_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes((10**15).to_bytes(8, "little") + file.read_bytes()[8:])


def _overlap(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    names = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)]
    header[names[0]]["data_offsets"] = header[names[1]]["data_offsets"]
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def _other_tokenizer_json(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"<s>": 1, "</s>": 17}}}))


def _lose_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _lose_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "model-00001-of-00002.safetensors"}})
    )


def _lose_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")


def _only_gguf(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.gguf")


def _name_a_file_elsewhere(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../model.safetensors"}}))


def _name_no_file(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": 5}}))


def _change_tensors(folder: Path, change: object) -> None:
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(tensors)  # type: ignore[operator]
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def _lose_tensor(folder: Path) -> None:
    _change_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


def _add_tensor(folder: Path) -> None:
    _change_tensors(folder, lambda tensors: tensors.update(bias=np.zeros(3, np.float32)))


def _change_shape(folder: Path) -> None:
    _change_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": np.zeros((319, 48), np.float32)}))


def _mixed_dtypes(folder: Path) -> None:
    _change_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": np.ones(48, np.float32)}))


def _change_config(**change: object) -> object:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **change}))

    return apply


def _other_vocabulary(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(train_tokenizer(TEXTS, vocab_size=325).model)


def _no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.model").unlink()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (_truncate, "model.safetensors is truncated or damaged"),
        (_lie_about_an_offset, "model.safetensors is truncated or damaged"),
        (_lie_about_the_header, "model.safetensors is truncated or damaged"),
        (_overlap, "model.safetensors is truncated or damaged"),
        (_lose_weights, "holds no weights: none of model.safetensors, .*, pytorch_model.bin.index.json"),
        (
            _lose_shard,
            "model-00001-of-00002.safetensors, which model.safetensors.index.json names, is missing",
        ),
        (
            _change_config(rope_theta=5e5, rope_parameters={"rope_theta": 1e6}),
            "rope_theta=500000.0 and rope_parameters.rope_theta=1000000.0 differ",
        ),
        (_change_config(model_type=["llama"]), "is not supported"),
        (_name_a_file_elsewhere, "its weight_map must name files of the same folder"),
        (_name_no_file, "its weight_map must name files of the same folder"),
        (_lose_tensor, "1 tensors of the model are missing, first model.layers.1.mlp.up_proj.weight"),
        (_add_tensor, "1 tensors are not of this model, first bias"),
        (_change_shape, r"lm_head.weight has shape \(319, 48\), its config makes it \(320, 48\)"),
        (_change_config(model_type="gpt2"), "model_type='gpt2' is not supported"),
        (_change_config(tie_word_embeddings=True), "tie_word_embeddings=True is not supported"),
        (_change_config(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5}), "rope_parameters"),
        (_change_config(num_key_value_heads=4), "num_heads=6 must be a multiple of num_kv_heads=4"),
        (_change_config(rms_norm_eps=None), "does not say the model's rms_norm_eps"),
        (_change_config(num_hidden_layers=10**9), "its config says 1000000000 layers, more than there are tensors"),
        (_change_config(num_attention_heads="many"), "num_heads='many'"),
        (_change_config(num_attention_heads=0), "num_heads=0"),
        (_change_config(rope_scaling="x", rope_parameters=None), "rope_scaling='x' must be a mapping"),
        (_change_config(partial_rotary_factor=0.5), "partial_rotary_factor=0.5 is not supported"),
        (lambda folder: (folder / "config.json").write_text("[]"), "must hold a JSON object, not list"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": '), "is not valid JSON"),
        (_mixed_dtypes, r"several dtypes \(bfloat16, float32\): give --dtype"),
        (_other_vocabulary, "325 pieces but the model's vocab_size is 320"),
        (
            _no_tokenizer,
            "holds no tokenizer.model, SentencePiece's file .*: put it there, or name it with --tokenizer",
        ),
        (_lose_index, "holds model-00001-of-00002.safetensors, but no index of its files"),
        (_only_gguf, r"holds no weights: .* \(formats like that of model.gguf are not read\)"),
        (_change_config(quantization_config={"bits": 4}), "quantization_config={'bits': 4} is not supported"),
        (
            _change_config(rope_parameters={"rope_theta": 1e4}, rope_scaling={"type": "linear", "factor": 2.0}),
            "rope_scaling={'type': 'linear', 'factor': 2.0} is not supported",
        ),
        (_other_tokenizer_json, "tokenizer.json has '<unk>' as number None, tokenizer.model as 0"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(source: Path, tmp_path: Path, damage: object, told: str) -> None:
    damage(source)  # type: ignore[operator]
    with pytest.raises(UsageError, match=told):
        convert(source, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_weights_are_read_from_the_layer_they_belong_to(golden: Path, tokenizer_file: Path, tmp_path: Path) -> None:
    tensors = safetensors.numpy.load_file(golden / "llama_gqa" / "model.safetensors")
    import_weights(str(golden / "llama_gqa"), str(tmp_path), tokenizer=str(tokenizer_file), dtype="float32")
    pieces = LazyReader(open_checkpoint(str(tmp_path))).pieces("blocks.attention.key")
    key = np.concatenate([piece.copy() for piece in pieces])
    theirs = tensors["model.layers.1.self_attn.k_proj.weight"].astype(np.float32)
    # Head 1, dimension 3 of the second layer's key is row 1 * head_dim + 3 of its matrix.
    np.testing.assert_array_equal(key[1, :, 1, 3], theirs[1 * 8 + 3])


def test_a_padded_vocabulary_is_taken(golden: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "mathscale")
    file = tmp_path / "tokenizer.model"
    file.write_bytes(train_tokenizer(TEXTS, vocab_size=310).model)
    import_weights(str(golden / "llama_gqa"), str(tmp_path / "out"), tokenizer=str(file))
    assert "the vocabulary of 310 pieces is padded to 320" in caplog.text
    checkpoint = open_checkpoint(str(tmp_path / "out"))
    assert (checkpoint.tokenizer.vocab_size, checkpoint.meta.model.vocab_size) == (310, 320)


def test_a_name_on_the_hub_is_fetched_with_what_is_needed_of_it(
    golden: Path, tokenizer_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's client is a stand-in here: there is no network in tests."""
    asked = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(golden / "llama_gqa")

    hub = types.SimpleNamespace(
        list_repo_files=lambda _: ["model.safetensors", "x.bin"], snapshot_download=snapshot_download
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    import_weights("some/model", str(tmp_path / "out"), tokenizer=str(tokenizer_file))
    ((name, patterns),) = asked
    assert name == "some/model" and "model-*.safetensors" in patterns and "tokenizer.model" in patterns
    hub.list_repo_files = lambda _: ["params.json", "consolidated.00.pth", "tokenizer.model"]
    import_weights("some/of-meta", str(tmp_path / "meta"), tokenizer=str(tokenizer_file))
    assert {"params.json", "consolidated.*.pth", "tokenizer.model"} <= set(asked[1][1])
    hub.list_repo_files = lambda _: (_ for _ in ()).throw(OSError("401 Client Error: gated"))
    with pytest.raises(RunError, match="the hub does not give it: 401 Client Error"):
        import_weights("some/gated", str(tmp_path / "other"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match=r"-e '\.\[hub\]'"):
        import_weights("some/other", str(tmp_path / "other"))
    with pytest.raises(UsageError, match="is no folder; give one with"):
        import_weights("/not/there", str(tmp_path / "other"))


def test_object_stores_are_refused_for_hugging_face_folders(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "checkpoint")
    with pytest.raises(UsageError, match="local disk"):
        export_hf(str(tmp_path / "checkpoint"), "gs://bucket/model")
    with pytest.raises(UsageError, match="local disk"):
        import_weights("gs://bucket/model", str(tmp_path / "other"))


def test_what_is_in_a_destination_is_not_lost(source: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds notes\.txt, which no import left there"):
        convert(source, precious)
    (precious / "notes.txt").rename(precious / "tokenizer.model")
    with pytest.raises(UsageError, match=r"holds another tokenizer\.model, which would be lost"):
        convert(source, precious)
    assert (precious / "tokenizer.model").read_text() == "mine"
    with pytest.raises(UsageError, match=r"holds config\.json, which no import left there"):
        convert(source, source)


def test_two_conversions_into_one_folder_do_not_mix(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "checkpoint")
    for folder in (tmp_path / "other", tmp_path / ".out.partial"):
        folder.mkdir()
    with locked(epath.Path(tmp_path / "other"), "DST"), pytest.raises(UsageError, match="in use by another run"):
        convert(source, tmp_path / "other")
    with locked(epath.Path(tmp_path / ".out.partial"), "DST"), pytest.raises(UsageError, match="in use by another"):
        export_hf(str(tmp_path / "checkpoint"), str(tmp_path / "out"))
    export_hf(str(tmp_path / "checkpoint"), str(tmp_path / "out"))
    assert ".lock" not in {path.name for path in (tmp_path / "out").iterdir()}


def test_the_folder_of_a_run_is_no_destination(source: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UsageError, match="the folder of a training run"):
        convert(source, tmp_path / "run")
