"""Keys are read from the environment, sent where they belong, and neither kept nor shown."""

import contextlib
from pathlib import Path

import pytest
from teachers import Teacher

from data_pipeline.cli import RunError
from data_pipeline.settings import UsageError
from data_pipeline.synthesis.rules import RuleTeacher, completion
from data_pipeline.synthesis.run import synthesize

HONEST = RuleTeacher(wrong_questions=0, wrong_answers=0)


def test_a_key_is_needed_sent_and_never_kept(server, settings_of, monkeypatch, caplog):
    sent = []

    class Locked(Teacher):
        def trouble(self, key, times, body, prompt):
            sent.append(self.headers["Authorization"])
            return False

    url, _ = server(Locked, rules=HONEST)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(
        UsageError, match=r"no key for https://api\.openai\.com/v1: set the environment variable OPENAI_API_KEY"
    ):
        synthesize(settings_of("https://api.openai.com/v1"))
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    settings = settings_of(url, num_items=3, teacher={"key_variable": "MY_KEY"})
    synthesize(settings)
    assert set(sent) == {"Bearer sk-very-secret"}
    kept = [file.read_bytes() for file in Path(settings.out).rglob("*") if file.is_file()]
    assert kept and not any(b"very-secret" in content for content in kept) and "very-secret" not in caplog.text


def test_openais_key_is_not_sent_elsewhere_unasked(settings_of, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai")
    with pytest.raises(UsageError, match=r"no key for https://other\.example/v1: say in teacher\.key_variable"):
        synthesize(settings_of("https://other.example/v1"))


def test_a_key_that_a_server_says_again_is_neither_kept_nor_shown(server, settings_of, monkeypatch):
    class Echo(Teacher):
        def trouble(self, key, times, body, prompt):
            self.error(401, f"bad key {self.headers['Authorization']}")
            return True

    url, _ = server(Echo)
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    settings = settings_of(url, num_items=3, teacher={"key_variable": "MY_KEY"})
    with pytest.raises(RunError, match="refuses the key") as error:
        synthesize(settings)
    assert "very-secret" not in str(error.value) and "***" in str(error.value)
    assert not any(b"very-secret" in f.read_bytes() for f in Path(settings.out).rglob("*") if f.is_file())


def test_a_key_that_is_said_again_behind_a_long_text_is_not_kept_in_part(server, settings_of, monkeypatch):
    class Echo(Teacher):
        def trouble(self, key, times, body, prompt):
            said = "x" * 230 + " " + self.headers["Authorization"]
            self.answer(401, {"error": {"message": said, "code": "bad", "type": "bad"}})
            return True

    url, _ = server(Echo)
    monkeypatch.setenv("MY_KEY", "sk-very-secret-" + "k" * 60)
    settings = settings_of(url, num_items=3, teacher={"key_variable": "MY_KEY"})
    with pytest.raises(RunError, match="refuses the key") as error:
        synthesize(settings)
    assert "very-secret" not in str(error.value)
    assert not any(b"very-secret" in file.read_bytes() for file in Path(settings.out).rglob("*") if file.is_file())
    monkeypatch.setenv("MY_KEY", "sk-se\u00e7ret")
    with pytest.raises(UsageError, match="holds a character that no key has"):
        synthesize(settings)


def test_a_key_in_a_reply_is_not_kept(server, settings_of, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-very-secret-indeed")

    class Parrot(Teacher):
        def complete(self, body, prompt):
            key = self.headers["Authorization"].removeprefix("Bearer ")
            self.answer(
                200, completion(f"CREATED QUESTION: What is {key}?\nSOLUTION: {key}\nFINAL ANSWER: 7", body, prompt)
            )

    url, _ = server(Parrot)
    settings = settings_of(url, teacher={"key_variable": "MY_KEY"}, num_items=3)
    with contextlib.suppress(RunError):
        synthesize(settings)
    kept = [
        file.name for file in Path(settings.out).rglob("*") if file.is_file() and b"very-secret" in file.read_bytes()
    ]
    assert not kept


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        ({"base_url": "https://host/v1?api-key=sk-secret"}, "teacher.base_url must hold no key, password or query"),
        ({"base_url": "https://me:sk-secret@host/v1"}, "teacher.base_url must hold no key, password or query"),
        ({"key_variable": "sk-secret-1"}, "teacher.key_variable must be the name of an environment variable"),
    ],
)
def test_a_key_where_none_belongs_is_refused_and_not_shown(settings_of, teacher, said):
    with pytest.raises(UsageError, match=said) as error:
        settings_of("http://localhost/v1", teacher=teacher)
    assert "secret" not in str(error.value)
