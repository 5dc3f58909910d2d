"""An exported tokenizer splits text as SentencePiece does, whatever library reads it. Needs the torch extra."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.tokenizer import Tokenizer, train_tokenizer
from mathscale_jax.convert.tokenizer_files import fast_tokenizer, write_tokenizer

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def published(test_data: Path) -> Tokenizer:
    return Tokenizer.load(str(test_data / "mistral_v1_tokenizer.model"))


def read_by_transformers(folder: Path, tokenizer: Tokenizer, companions: dict[str, Any]) -> Any:
    transformers = pytest.importorskip("transformers")
    write_tokenizer(folder, tokenizer, companions, 4096)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return transformers.AutoTokenizer.from_pretrained(folder)


def texts_of(test_data: Path) -> list[str]:
    texts = []
    for name, keys in (("gsm8k_test", ("question", "answer")), ("math_test", ("problem", "solution"))):
        with gzip.open(test_data / f"{name}.jsonl.gz", "rt") as file:
            rows = [json.loads(line) for line in file][:700]
        texts += [row[key] for row in rows for key in keys]
    return texts


def test_transformers_encodes_and_decodes_as_sentencepiece(
    published: Tokenizer, test_data: Path, tmp_path: Path
) -> None:
    theirs = read_by_transformers(tmp_path, published, {})
    spaces = [f"{' ' * n}x{' ' * n}\n{' ' * n}y" for n in range(40)]
    unusual = ["", " ", "é≤∑ 数学 \u200b \U0001f600", "tab\tand\r\nlines\n\n", "½ − ² ＋"]
    for text in texts_of(test_data) + spaces + unusual:
        ids = published.encode_prompt(text)
        assert theirs(text)["input_ids"] == ids, text
        assert theirs.decode(ids[1:]) == text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (published.bos_id, published.eos_id)


def test_a_published_config_without_a_tokenizer_json_has_the_right_merges(
    published: Tokenizer, test_data: Path, tmp_path: Path
) -> None:
    """transformers' own conversion puts the pieces of spaces first: two spaces before a word split otherwise."""
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "bos_token": "<s>"}
    theirs = read_by_transformers(tmp_path, published, {"tokenizer_config.json": config})
    for text in texts_of(test_data)[:500]:
        assert theirs(text)["input_ids"] == published.encode_prompt(text), text


def test_a_tokenizer_trained_here_too(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["Ann has 12 apples and 3 pears.", "Bob has 45 apples."], vocab_size=300)
    theirs = read_by_transformers(tmp_path, tokenizer, {})
    for text in ("Ann has 45 pears", "  zebras\n\n and 1234567890 + ü"):
        assert theirs(text)["input_ids"] == tokenizer.encode_prompt(text)


def test_what_a_tokenizer_json_cannot_say_is_left_to_its_readers(published: Tokenizer) -> None:
    from sentencepiece import sentencepiece_model_pb2

    model: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    model.ParseFromString(published.model)
    model.normalizer_spec.remove_extra_whitespaces = True
    assert fast_tokenizer(Tokenizer(model.SerializeToString())) is None
