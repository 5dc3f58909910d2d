"""The tokenizer against the sentencepiece library itself."""

import numpy as np
import pytest
import sentencepiece

from data_pipeline.settings import UsageError
from data_pipeline.tokenizer import Tokenizer, train_tokenizer

TEXTS = [
    "",
    "Ann has 3 pens.",
    "two\nlines\n\nand more\n",
    "  leading,  double and trailing  ",
    "\ttabs\tand\r\nreturns",
    r"$\frac{1}{2}$ and {braces}",
    "caf\u00e9 na\u00efve \u2212\u00bd \u4e00\u4e8c \U0001f95a",
    "1234567890 3.14",
    "<s> </s> <unk> <0x0A>",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["small_tokenizer", "large_tokenizer"])
def test_text_survives_encoding_and_decoding(request, name, text):
    tokenizer = request.getfixturevalue(name)
    assert tokenizer.decode(tokenizer.encode_prompt(text)) == text
    assert tokenizer.decode(tokenizer.encode_response(text)) == text
    assert tokenizer.decode(np.array(tokenizer.encode_prompt(text), np.int32)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_those_of_the_sentencepiece_library(test_data, large_tokenizer, text):
    library = sentencepiece.SentencePieceProcessor(model_file=str(test_data / "mistral_v1_tokenizer.model"))
    assert large_tokenizer.encode_prompt(text) == library.encode(text, add_bos=True)
    assert large_tokenizer.encode_response(text) == library.encode(text, add_eos=True)


def test_gsm8k_pieces_are_those_of_the_sentencepiece_library(test_data, large_tokenizer, gsm8k_test):
    library = sentencepiece.SentencePieceProcessor(model_file=str(test_data / "mistral_v1_tokenizer.model"))
    for problem in gsm8k_test[::20]:
        assert large_tokenizer.encode_prompt(problem.question) == [1, *library.encode(problem.question)]
        assert large_tokenizer.encode_response(problem.solution) == [*library.encode(problem.solution), 2]


def test_the_public_tokenizer_has_the_ids_of_llama(large_tokenizer):
    assert (large_tokenizer.vocab_size, large_tokenizer.bos_id, large_tokenizer.eos_id) == (32000, 1, 2)
    # Byte pieces begin at 3, so a newline (byte 10), which is no piece of its own there, is 13.
    assert large_tokenizer.encode_response("a\nb")[-3] == 13


@pytest.mark.parametrize("name", ["small_tokenizer", "large_tokenizer"])
def test_bos_opens_a_prompt_and_eos_closes_a_response_and_text_makes_neither(request, name):
    tokenizer = request.getfixturevalue(name)
    special = {tokenizer.bos_id, tokenizer.eos_id}
    prompt, response = tokenizer.encode_prompt("<s> a </s>"), tokenizer.encode_response("<s> a </s>")
    assert prompt[0] == tokenizer.bos_id and not special & set(prompt[1:])
    assert response[-1] == tokenizer.eos_id and not special & set(response[:-1])


def test_a_trained_tokenizer_keeps_digits_apart():
    # Without the rule the frequent years would become pieces: they are all there is to merge.
    tokenizer = train_tokenizer(["In 1987 or 2024. In 1987 and 2024."] * 50, 285)
    library = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    pieces = [library.id_to_piece(i) for i in range(tokenizer.vocab_size) if not library.is_byte(i)]
    assert [piece for piece in pieces if sum(c.isdigit() for c in piece) > 1] == []
    assert [library.id_to_piece(i) for i in tokenizer.encode_response("x1987")][-5:-1] == list("1987")


def test_training_a_tokenizer_is_deterministic():
    texts = ["Ann has 3 pens.", "Ben buys 12 more pens and books."] * 20
    first, second = (train_tokenizer(iter(texts), 290) for _ in range(2))
    assert first.model == second.model and first.sha256 == second.sha256
    assert train_tokenizer(texts + ["Zoe zips."] * 9, 290).sha256 != first.sha256
    assert first.vocab_size == 290


def test_a_vocabulary_that_the_texts_cannot_fill_is_a_usage_error():
    with pytest.raises(UsageError, match="no tokenizer of 5000 pieces"):
        train_tokenizer(["Ann has 3 pens."], 5000)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x00" * 100, b'{"model": "json"}'])
def test_a_file_that_is_no_sentencepiece_model_is_a_usage_error_that_names_it(tmp_path, content):
    (tmp_path / "bad.model").write_bytes(content)
    with pytest.raises(UsageError, match=r"bad\.model.*SentencePiece model"):
        Tokenizer.load(str(tmp_path / "bad.model"))


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"tokenizer '.*none\.model' does not exist"):
        Tokenizer.load(tmp_path / "none.model")


def test_ids_beyond_the_pieces_are_an_index_error(small_tokenizer):
    with pytest.raises(IndexError):
        small_tokenizer.decode([small_tokenizer.vocab_size])
