"""A tokenizer as transformers and serving engines read it, so that they split text as it was split in training."""

from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from data_pipeline.files import write_json
from data_pipeline.settings import UsageError
from data_pipeline.tokenizer import Tokenizer
from mathscale_jax.checkpoint import TOKENIZER_FILE

FAST_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
# Small files of a Hugging Face folder that go with the weights wherever they go.
COMPANIONS = (
    *(FAST_FILE, CONFIG_FILE, "special_tokens_map.json", "added_tokens.json", "generation_config.json"),
    "chat_template.jinja",
)
TEMPLATE_FILE = "prompt_template.yaml"  # ours: nobody else reads it
_SPACE = "▁"


def write_tokenizer(folder: Path, tokenizer: Tokenizer, companions: dict[str, Any], max_context: int) -> None:
    """Writes tokenizer.model, the `companions` that were published with it, and what they lack of these two:

    tokenizer.json, and a tokenizer_config.json by which a prompt begins with BOS, as it does in training and in our
    sampler.
    """
    (folder / TOKENIZER_FILE).write_bytes(tokenizer.model)
    files = {name: companions[name] for name in COMPANIONS if name in companions}
    if FAST_FILE not in files:
        fast = fast_tokenizer(tokenizer)
        if fast is not None:
            files[FAST_FILE] = fast
    names = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "unk_token": tokenizer.unk_id}
    rules = {
        # As its file says; LlamaTokenizer makes its merges itself, in another order than SentencePiece's scores.
        "tokenizer_class": "PreTrainedTokenizerFast" if FAST_FILE in files else "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "model_max_length": max_context,
        **{name: tokenizer.piece(token_id) for name, token_id in names.items()},
    }
    files.setdefault(CONFIG_FILE, rules)
    for name, content in files.items():
        if isinstance(content, str):
            (folder / name).write_text(content)
        else:
            write_json(folder / name, content)


def fast_tokenizer(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """The content of a tokenizer.json that encodes as the SentencePiece model; None where it cannot say the same.

    That is so for models that are not BPE, that normalise text, or that have symbols of their users'. The marks of
    beginning and end are text to SentencePiece and marks to what reads this file, as with every published one.
    """
    messages: Any = sentencepiece_model_pb2  # made at import, unknown to type checkers
    model = messages.ModelProto()
    model.ParseFromString(tokenizer.model)
    kinds = type(model.pieces[0])
    normaliser = model.normalizer_spec
    if model.trainer_spec.model_type != model.trainer_spec.BPE or normaliser.precompiled_charsmap:
        return None
    if normaliser.remove_extra_whitespaces or not normaliser.add_dummy_prefix:
        return None
    if model.trainer_spec.treat_whitespace_as_suffix or any(p.type == kinds.USER_DEFINED for p in model.pieces):
        return None
    special = (kinds.UNKNOWN, kinds.CONTROL)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    bos = tokenizer.piece(tokenizer.bos_id)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": piece.piece, **flags, "special": True}
            for i, piece in enumerate(model.pieces)
            if piece.type in special
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": _SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                *({"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}),
                *({"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}),
            ],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": tokenizer.piece(tokenizer.unk_id),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": model.trainer_spec.byte_fallback,
            "ignore_merges": False,
            "vocab": {piece.piece: i for i, piece in enumerate(model.pieces)},
            "merges": _merges({piece.piece: piece.score for piece in model.pieces if piece.type == kinds.NORMAL}),
        },
    }


def _merges(scores: dict[str, float]) -> list[str]:
    """Every pair of pieces that is a piece, in the order in which SentencePiece joins them.

    It joins the pair of the highest score, and the leftmost of equal ones: a piece grows to its right before another
    one begins, hence the longest left half first.
    """
    pairs = [
        (left, right)
        for piece in scores
        for left, right in ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        if left in scores and right in scores
    ]
    pairs.sort(key=lambda pair: (-scores["".join(pair)], -len(pair[0])))
    return [" ".join(pair) for pair in pairs]  # as old readers know them too; no piece has a space in it


def check_companions(tokenizer: Tokenizer, companions: dict[str, Any]) -> None:
    """Raises UsageError where a tokenizer.json has other pieces than the tokenizer."""
    fast = companions.get(FAST_FILE, {})
    model = fast.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict):
        return
    added = {token["content"]: token["id"] for token in fast.get("added_tokens", []) if isinstance(token, dict)}
    for i in range(tokenizer.vocab_size):
        piece = tokenizer.piece(i)
        number = vocabulary.get(piece, added.get(piece))
        if number != i:
            raise UsageError(
                f"{FAST_FILE} has {piece!r} as number {number}, {TOKENIZER_FILE} as {i}: they are of "
                "different models; remove the one that is not of these weights"
            )
