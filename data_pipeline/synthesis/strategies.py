"""Strategies: how a seed becomes a new problem. Each is one YAML file in strategies/, or the user's own."""

import difflib
import functools
import hashlib
import json
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import pydantic

from data_pipeline.problem import Problem
from data_pipeline.settings import Settings, UsageError, read_yaml, validated

_FOLDER = Path(__file__).parent
_PLACE = re.compile(r"\{(create|rules|reference|question|answer|masked)\}")
_WOULD_BE_PLACE = re.compile(r"(?<![\\\w}^_])\{([a-z]{3,})\}")  # not the argument of a LaTeX command
_NUMBER = re.compile(r"(?<![\w.,])\d[\d,]*(?:\.\d+)?(?![\w])")
Kind = Literal["number", "latex"]
ANSWER_FIELDS = ("solution", "final answer")


class Strategy(Settings):
    """One way to make a question of a seed; then it is answered. Give `create`, `question` or `given`.

    Texts may use {question} and {answer} of the seed, and {masked}, its question with a number replaced by x.
    """

    about: str = pydantic.Field(description="one line for people")
    create: str | None = pydantic.Field(
        None, description="what the teacher is to create, in the paper's call that creates, verifies and modifies"
    )
    verify: bool = pydantic.Field(True, description="of create: verify and modify, too")
    question: str | None = pydantic.Field(None, description="or: the whole prompt of the call that makes the question")
    fields: tuple[str, ...] = pydantic.Field((), description="labels of that call's reply; the last is the question")
    given: str | None = pydantic.Field(None, description="or: the question, made without a call")
    mask: bool = pydantic.Field(False, description="a number of the seed is replaced by x")
    expects: Literal["seed", "masked"] | None = pydantic.Field(
        None, description="the answer that is known: rows with another one are left out"
    )

    @pydantic.model_validator(mode="after")
    def _is_one_way(self) -> "Strategy":
        if sum(text is not None for text in (self.create, self.question, self.given)) != 1:
            raise ValueError("give one of create, question and given")
        if (self.question is not None) != bool(self.fields):
            raise ValueError("question and fields go together")
        texts = f"{self.create or ''}{self.question or ''}{self.given or ''}"
        unknown = [place for place in _WOULD_BE_PLACE.findall(texts) if place not in ("question", "answer", "masked")]
        if unknown:
            raise ValueError(f"{{{unknown[0]}}} is no place; there are {{question}}, {{answer}} and {{masked}}")
        if self.create is None and "{question}" not in texts and "{masked}" not in texts:
            raise ValueError("the text must hold {question} or {masked}: the seed is not in it")
        if self.mask != ("{masked}" in texts) or (self.expects == "masked" and not self.mask):
            raise ValueError("mask=true goes with {masked} in the text, and expects=masked with mask=true")
        return self

    @property
    def asks(self) -> bool:
        """Whether the question takes a call."""
        return self.given is None

    @property
    def question_fields(self) -> tuple[str, ...]:
        """The labels of the question call's reply; the last is the question."""
        if self.create is None:
            return self.fields
        verified = ("created question", "verification and modification", "final created question")
        return verified if self.verify else verified[:1]

    @property
    def keeps_question(self) -> bool:
        """Whether the question is the seed's own, so that rows differ in their solutions only."""
        return self.given is not None and not self.mask

    def question_prompt(self, seed: Problem, masked: "Masked | None", kind: Kind) -> str:
        """The prompt of the question call; without a call, the question itself."""
        values = {"question": seed.question, "reference": seed.question, "answer": seed.answer}
        if masked is not None:
            values["masked"] = masked.question
        return filled(self._layout(kind), values)

    def read_prompt(self, prompt: str, kind: Kind) -> dict[str, str] | None:
        """The texts that `question_prompt` made a prompt of, by their places; None where it is another's prompt."""
        return unfilled(self._layout(kind), prompt)

    def _layout(self, kind: Kind) -> str:
        """The prompt of the question call, with the places of the seed's texts left open."""
        if self.create is None:
            return self.question or self.given or ""
        layout = _prompt("question_verified" if self.verify else "question_unverified")
        return filled(layout, {"create": self.create.strip(), "rules": _prompt(f"rules_{kind}")})

    def placeholders(self, kind: Kind) -> set[str]:
        """What stands in the form of the question call's reply, and is no reply."""
        return set(re.findall(r"<([^<>\n]+)>", self._layout(kind)))

    def digests(self, kind: Kind) -> dict[str, str]:
        """Identifies the wording of each prompt file, and of each key of the strategy."""
        names = ("question_verified", "question_unverified", f"rules_{kind}", f"answer_{kind}")
        texts = {name: _prompt(name) for name in names} | self.model_dump(mode="json", exclude={"about"})
        return {name: hashlib.sha256(json.dumps(text).encode()).hexdigest()[:12] for name, text in texts.items()}

    def digest(self, kind: Kind) -> str:
        """Identifies all wording."""
        return hashlib.sha256(json.dumps(self.digests(kind)).encode()).hexdigest()[:16]


class Masked(Settings):
    """A question in which one number is replaced by x, and that number."""

    question: str
    value: str


def strategies() -> dict[str, Strategy]:
    """All that come with the package, by name."""
    return {path.stem: load_strategy(path.stem) for path in sorted((_FOLDER / "strategies").glob("*.yaml"))}


def load_strategy(name: str) -> Strategy:
    """A strategy by its name, or a YAML file's path. Raises UsageError."""
    own = _FOLDER / "strategies" / f"{name}.yaml"
    if own.is_file():
        path = str(own)
    elif name.endswith((".yaml", ".yml")):
        path = name
        if not Path(name).is_file():
            raise UsageError(f"strategy={name!r}: there is no such file")
    else:
        known = sorted(path.stem for path in (_FOLDER / "strategies").glob("*.yaml"))
        meant = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {meant[0]}? " if meant else ""
        raise UsageError(f"strategy={name!r} is unknown; {hint}allowed: {', '.join(known)}, or the path of a YAML file")
    return validated(Strategy, read_yaml(path), where=f"strategy {name}")


def answer_prompt(question: str, kind: Kind) -> str:
    """The prompt of the answer call."""
    return filled(_prompt(f"answer_{kind}"), {"question": question})


def masked(seed: Problem, variation: int, random_seed: int) -> Masked | None:
    """The seed with its `variation`-th number, in a random order, replaced by x; None where it has none."""
    places = list(_NUMBER.finditer(seed.question))
    if not places:
        return None
    random.Random(f"{random_seed} {seed.id}").shuffle(places)
    place = places[variation % len(places)]
    question = f"{seed.question[: place.start()]}x{seed.question[place.end() :]}"
    return Masked(question=question, value=place[0].replace(",", ""))


def filled(text: str, values: Mapping[str, str]) -> str:
    """`text` with its places filled; braces of LaTeX are none, nor is what is filled in looked at again."""
    return _PLACE.sub(lambda place: values.get(place[1], place[0]), text).strip()


def unfilled(layout: str, text: str) -> dict[str, str] | None:
    """The texts with which `filled` makes `text` of `layout`, by their places; None where it cannot."""
    pieces = _PLACE.split(layout.strip())  # text and place by turns
    pattern, seen = "", set()
    for index, piece in enumerate(pieces):
        if index % 2 == 0:
            pattern += re.escape(piece)
        else:
            pattern += f"(?P={piece})" if piece in seen else f"(?P<{piece}>.+?)"
            seen.add(piece)
    match = re.fullmatch(pattern, text, re.DOTALL)
    return None if match is None else match.groupdict()


@functools.cache
def _prompt(name: str) -> str:
    return (_FOLDER / "prompts" / f"{name}.txt").read_text(encoding="utf-8").strip()
