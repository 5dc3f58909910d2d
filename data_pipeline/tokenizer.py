"""SentencePiece, as LLaMA uses it."""

import functools
import hashlib
import io
from collections.abc import Iterable, Sequence

import sentencepiece
from etils import epath

from data_pipeline.cli import logger
from data_pipeline.settings import UsageError, require_file

_MAX_PADDING = 1024  # vocabularies are padded to a multiple of 8 to 512, and have room for added tokens


class Tokenizer:
    """A SentencePiece model. Encoding splits text exactly as LLaMA's own tokenizer does."""

    def __init__(self, model: bytes):
        """`model` is the content of a tokenizer.model file. Raises ValueError where it is no such file."""
        self.model = model
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError) as error:
            raise ValueError("not a SentencePiece model") from error
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        self.unk_id: int = self._processor.unk_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError("the SentencePiece model has no BOS or no EOS piece; LLaMA models need both")

    @classmethod
    def load(cls, path: str | epath.Path) -> "Tokenizer":
        """Reads a tokenizer.model file. Raises UsageError."""
        file = require_file(str(path), "tokenizer")
        try:
            return cls(file.read_bytes())
        except ValueError as error:
            raise UsageError(f"tokenizer {str(path)!r}: {error}") from error

    @functools.cached_property
    def sha256(self) -> str:
        """Identifies the tokenizer."""
        return hashlib.sha256(self.model).hexdigest()

    def piece(self, token_id: int) -> str:
        """The text of one piece, such as "<s>" for BOS."""
        return self._processor.id_to_piece(token_id)

    def encode_prompt(self, text: str) -> list[int]:
        """BOS and the pieces of a prompt."""
        return [self.bos_id, *self._processor.encode(text)]

    def encode_response(self, text: str) -> list[int]:
        """The pieces of a response and EOS. Encoded apart from the prompt, as a sampler meets it."""
        return [*self._processor.encode(text), self.eos_id]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; BOS and EOS give none. Ids beyond the pieces raise IndexError."""
        return self._processor.decode([int(i) for i in ids if i not in (self.bos_id, self.eos_id)])


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, what: str) -> None:
    """Raises UsageError where a tokenizer does not belong to a model of so many rows.

    A vocabulary may be padded: rows of the model beyond the pieces are kept, trained like any other and never drawn.
    """
    padding = vocab_size - tokenizer.vocab_size
    if not 0 <= padding <= _MAX_PADDING:
        raise UsageError(
            f"{what} has {tokenizer.vocab_size} pieces but the model's vocab_size is {vocab_size}; use the "
            f"tokenizer the model was made with (at most {_MAX_PADDING} rows may pad a vocabulary)"
        )
    if padding:
        logger.info("the vocabulary of %d pieces is padded to %d", tokenizer.vocab_size, vocab_size)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A small LLaMA-like tokenizer: BPE, digits apart, bytes as fallback, newlines kept. Deterministic.

    Raises UsageError where `vocab_size` is more than the texts can fill.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            split_digits=True,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            num_threads=1,  # the pieces must not depend on the machine
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UsageError(f"no tokenizer of {vocab_size} pieces can be trained on these texts: {error}") from error
    return Tokenizer(model.getvalue())
