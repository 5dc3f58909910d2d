"""OpenAI's Batch API as calls whose errors say what they mean for what was asked."""

from collections.abc import Callable
from typing import Any, Final, NamedTuple, TypeVar

import openai

from data_pipeline.cli import RunError, first_line
from data_pipeline.synthesis.direct import OUT_OF_QUOTA
from data_pipeline.synthesis.settings import Teacher

PATH: Final = "/v1/chat/completions"
_NAME = "mathscale_batch"  # under which the name stands in a batch's metadata
_RETRIES = 2  # of what costs nothing: looks, uploads, downloads
_TIMEOUT = 60.0  # seconds of a look
T = TypeVar("T")


class Gone(RunError):
    """It is not there, or not for this key."""


class Down(RunError):
    """No answer, or none that says anything: what was asked may have been done, and may be asked again later."""


class Busy(Down):
    """Too much just now: nothing was done."""


class Batch(NamedTuple):
    """A batch: its state, the files it brought, codes and messages of what it failed by, how many requests were done.

    None where that is not said.
    """

    id: str
    status: str
    files: tuple[str, ...]
    codes: tuple[str, ...]
    said: str
    num_done: int | None


class BatchServer:
    """Raises Gone, Busy, Down, and RunError where it is refused for good; the key stands in none of them."""

    def __init__(self, teacher: Teacher):
        self.where, self._clean = teacher.base_url, teacher.without_key
        self._client = openai.OpenAI(base_url=teacher.base_url, api_key=teacher.key(), max_retries=_RETRIES)
        self._quick = self._client.with_options(timeout=_TIMEOUT)

    def upload(self, name: str, content: bytes) -> str:
        """The id of a file of requests."""
        try:
            return self._asked(lambda: _text(self._client.files.create(file=(name, content), purpose="batch").id))
        except Gone as error:
            raise RunError(f"{error}: has it a Batch API? Without one, say transport=direct") from error

    def check_upload(self, upload: str) -> None:
        """Raises Gone where a file that was uploaded is not there."""
        self._asked(lambda: _text(self._quick.files.retrieve(upload).id))

    def create(self, upload: str, name: str) -> str:
        """The id of a new batch, which bears `name`. Asked once: where Down is raised, it may have been made."""
        client = self._client.with_options(max_retries=0)
        return self._asked(
            lambda: _text(
                client.batches.create(
                    input_file_id=upload, endpoint=PATH, completion_window="24h", metadata={_NAME: name}
                ).id
            )
        )

    def named(self) -> dict[str, str]:
        """The ids of all batches by their names."""
        every = self._asked(lambda: [(batch.metadata or {}, batch.id) for batch in self._quick.batches.list(limit=100)])
        return {metadata[_NAME]: remote for metadata, remote in every if _NAME in metadata}

    def batch(self, remote: str) -> Batch:
        """How a batch stands."""

        def look() -> Batch:
            batch = self._quick.batches.retrieve(remote)
            errors = (batch.errors.data or []) if batch.errors else []
            files = tuple(filter(None, (batch.output_file_id, batch.error_file_id)))
            said = "; ".join(filter(None, (error.message for error in errors)))
            counts = batch.request_counts
            return Batch(
                batch.id, _text(batch.status), files, tuple(e.code or "" for e in errors), self.cleaned(said, 1000),
                num_done=None if counts is None else counts.completed,
            )  # fmt: skip

        return self._asked(look)

    def content(self, file: str) -> bytes:
        """What is in a file."""
        return self._asked(lambda: self._client.files.content(file).content)

    def cleaned(self, text: str, length: int | None = None) -> str:
        """`text` without the key, and then cut."""
        return self._clean(text)[:length]

    def _asked(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except openai.APIStatusError as error:
            said, status = f"{self.where}: {self._said(error)}", error.status_code
            if status == 404:
                raise Gone(said) from error
            if status == 429 and not any(word in f"{error.code} {error.type}" for word in OUT_OF_QUOTA):
                raise Busy(said) from error
            raise (Down if status >= 500 or status in (408, 409) else RunError)(said) from error
        except (ValueError, AttributeError, TypeError) as error:  # a page where JSON should be
            raise Down(f"{self.where} answers with something that is no answer of a Batch API") from error
        except openai.OpenAIError as error:
            raise Down(f"{self.where} does not answer: {self._said(error)}") from error

    def _said(self, error: Exception) -> str:
        return first_line(self._clean(str(error)))


def _text(value: Any) -> str:
    """A value that must be a text. Raises ValueError."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"{value!r} is no text")
    return value
