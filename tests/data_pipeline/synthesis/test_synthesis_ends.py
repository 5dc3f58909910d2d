"""What whole runs leave and say: full disks, exchanged seeds, nothing kept, progress, dry runs, the report."""

import errno
import html
import json
import re
from pathlib import Path

import pytest
from teachers import Teacher, outcomes, rows_in

from data_pipeline.cli import RunError, is_disk_full
from data_pipeline.progress import Progress
from data_pipeline.synthesis import ledger
from data_pipeline.synthesis.estimate import dollars
from data_pipeline.synthesis.rules import RuleTeacher, completion, reply_to
from data_pipeline.synthesis.run import synthesize

HONEST = RuleTeacher(wrong_questions=0, wrong_answers=0)


@pytest.fixture
def full_at(monkeypatch):
    """Makes a disk that is full with so many pages of a ledger, until what is kept free on it is given up."""

    commit = ledger.Ledger._commit_once

    def fill(pages):
        def commit_if_there_is_room(self, connection, rows):
            is_given_up = self._reserve.exists() and not self._reserve.stat().st_size
            # What SQLite then says is what it says of a full disk.
            connection.execute(f"PRAGMA max_page_count = {10**6 if is_given_up else pages}")
            commit(self, connection, rows)

        monkeypatch.setattr(ledger.Ledger, "_commit_once", commit_if_there_is_room)

    return fill


def test_a_full_disk_is_said_and_what_is_under_way_is_kept(server, settings_of, full_at, monkeypatch):
    url, books = server(rules=HONEST)
    full_at(12)
    with pytest.raises(RunError, match=r"the disk is full: every reply is kept in .*make room, and go on"):
        synthesize(settings_of(url, num_items=150, limits={"concurrency": 16}))
    there = sum(status == "reply" for status, _, _ in outcomes(settings_of(url).out))
    assert 0 < there < 300 and there == sum(books.answered.values())
    full_at(10**6)
    synthesize(settings_of(url, num_items=150))
    assert len(rows_in(settings_of(url).out)) == 150
    assert sum(books.answered.values()) == 300
    assert not list(Path(settings_of(url).out).glob("*.reserve"))


def test_a_disk_without_any_room_is_said_with_the_ledgers_name(server, settings_of, monkeypatch):
    url, _ = server(rules=HONEST)

    def full(self, connection, rows):
        raise OSError(errno.ENOSPC, f"No space left on device for the ledger {self.path}")

    monkeypatch.setattr(ledger.Ledger, "_commit_once", full)
    with pytest.raises(OSError, match="No space left on device for the ledger") as error:
        synthesize(settings_of(url, num_items=15, limits={"concurrency": 4}))
    assert is_disk_full(error.value)


def test_seeds_that_were_exchanged_are_spoken_of(server, settings_of, seeds, caplog):
    url, books = server(rules=HONEST)
    synthesize(settings_of(url))
    rows = [json.loads(line) for line in Path(seeds).read_text().splitlines()]
    for row in rows[:4]:
        row["question"] = "So: " + row["question"]
    Path(seeds).write_text("\n".join(map(json.dumps, rows)))
    synthesize(settings_of(url))
    assert (
        "4 of the 30 seeds of before are not there any more, or are other ones: their rows are left out" in caplog.text
    )
    assert books.num_asked == 60 + 2 * 4


def test_what_is_kept_of_nothing_is_told_with_its_reasons_and_an_old_dataset_goes(server, settings_of, tmp_path):
    url, _ = server(rules=HONEST)
    settings = settings_of(url)
    synthesize(settings)
    dataset = Path(settings.out) / "dataset"
    assert dataset.exists()
    test_set = tmp_path / "test.jsonl"
    test_set.write_text("".join(json.dumps(row | {"lineage": None}) + "\n" for row in rows_in(settings.out)))
    with pytest.raises(RunError, match="no row is kept of 30 items"):
        synthesize(settings_of(url, against=f"jsonl:test={test_set}"))
    assert not dataset.exists()
    report = json.loads((Path(settings.out) / "report.json").read_text())
    assert report["removed"] == {"in a test set": 30} and report["num_kept"] == 0
    assert "row: is in a test set" in (Path(settings.out) / "report.html").read_text()


def test_a_run_that_is_not_done_leaves_the_dataset_of_before(server, settings_of):
    url, _ = server(rules=HONEST)
    spent = synthesize(settings_of(url))["dollars"]
    before = (Path(settings_of(url).out) / "dataset" / "metadata.json").read_bytes()
    with pytest.raises(RunError, match="is reached"):
        synthesize(settings_of(url, answers=3, budget=spent + 1e-6))
    assert (Path(settings_of(url).out) / "dataset" / "metadata.json").read_bytes() == before


def test_the_progress_line_says_what_was_spent_and_what_it_will_be(server, settings_of, monkeypatch):
    notes = []
    update = Progress.update
    monkeypatch.setattr(Progress, "update", lambda bar, *what: (notes.extend(what[1:]), update(bar, *what)))
    url, _ = server(rules=HONEST)
    first = dollars(1e9 * synthesize(settings_of(url, num_items=20))["dollars"])
    assert len(notes) == 20 and notes[-1] == f"{first}, {first} at the end"
    notes.clear()
    second = synthesize(settings_of(url, num_items=30))["dollars"]  # twenty are there: they cost and count nothing
    assert len(notes) == 10
    spent, ends = zip(*(map(float, re.findall(r"\$([\d.]+)", note)) for note in notes), strict=True)
    assert float(first.strip("$")) < spent[0] < spent[-1] and list(spent) == sorted(spent)
    assert spent[-1] == ends[-1] == pytest.approx(second, abs=0.01)
    assert all(second - 0.01 < end < 5 * second for end in ends)  # replies under way count, and their items do not yet


def test_a_sentence_is_no_answer_in_mathematics(server, settings_of, seeds, tmp_path):
    class Shy(Teacher):
        def complete(self, body, prompt):
            text = reply_to(prompt, body, HONEST)
            if "SOLUTION:" in prompt:
                text = "SOLUTION: Hm.\nFINAL ANSWER: I am not sure about this, sorry."
            self.answer(200, completion(text, body, prompt))

    url, _ = server(Shy)
    with pytest.raises(RunError, match="no row is kept"):
        synthesize(settings_of(url, seeds={"task": "latex", "path": seeds}, num_items=5))
    report = json.loads((Path(settings_of(url).out) / "report.json").read_text())
    assert report["lost"] == [{"stage": "answer", "reason": "ends in no mathematics", "count": 5}]


def test_the_form_of_a_reply_is_no_question(server, settings_of):
    class Echo(Teacher):
        def complete(self, body, prompt):
            form = prompt.partition("CREATED QUESTION:")[2]
            self.answer(200, completion(f"CREATED QUESTION:{form}", body, prompt))

    url, _ = server(Echo)
    with pytest.raises(RunError, match="no row is kept"):
        synthesize(settings_of(url, num_items=5, strategy="brand_new_unverified"))
    report = json.loads((Path(settings_of(url).out) / "report.json").read_text())
    assert report["lost"] == [{"stage": "question", "reason": "has no question", "count": 5}]


def test_a_dry_run_says_what_is_left_and_sends_nothing(server, settings_of, capsys):
    url, books = server(rules=HONEST)
    settings = settings_of(url, num_items=30, answers=2)
    synthesize(settings, dry_run=True)
    said = capsys.readouterr().out
    assert not books.num_asked and not Path(settings.out).exists()
    assert "30 items, of which 0 are done" in said and "Nothing was sent" in said
    question, answer = (
        next(line.split() for line in said.splitlines() if line.startswith(s)) for s in ("question", "answer")
    )
    assert (question[1], answer[1]) == ("30", "60")
    # Replies are assumed to be as long as they may be here: 400 tokens of a question, 250 of an answer.
    assert (question[3], answer[3]) == ("12,000", "15,000")
    expected = (int(question[2].replace(",", "")) + int(answer[2].replace(",", ""))) * 10e-6 + 27_000 * 30e-6
    assert f"Expected: ${expected:.2f}" in said
    assert "The reference question:" in said
    synthesize(settings_of(url, num_items=25))
    asked = books.num_asked
    files = {file: file.read_bytes() for file in Path(settings.out).iterdir() if file.is_file()}
    synthesize(settings, dry_run=True)
    assert files == {file: file.read_bytes() for file in Path(settings.out).iterdir() if file.is_file()}
    said = capsys.readouterr().out
    assert books.num_asked == asked
    question, answer = (
        next(line.split() for line in said.splitlines() if line.startswith(s)) for s in ("question", "answer")
    )
    assert (question[1], answer[1]) == ("5", str(5 * 2 + 25)), "a second answer to each question that is there"
    assert "as long as those in the ledger" in said


def test_a_budget_that_will_not_do_is_said_in_a_dry_run(server, settings_of, capsys):
    url, _ = server()
    synthesize(settings_of(url, budget=0.01), dry_run=True)
    assert "The budget will be reached before the end" in capsys.readouterr().out


def test_the_report_shows_what_came_of_it_and_no_text_runs_in_it(server, settings_of):
    class Rude(Teacher):
        def trouble(self, key, times, body, prompt):
            if int(key[0], 16) < 4:
                self.pay(key, completion("<script>alert(1)</script>", body, prompt))
                return True
            return False

    url, _ = server(Rude)
    settings = settings_of(url, attempts=1)
    report = synthesize(settings)
    page = (Path(settings.out) / "report.html").read_text()
    assert f"{report['num_kept']} new rows of 30 items" in page
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
    assert "question: has no question" in page and "Rows beside their seeds" in page
    assert "{{" not in page
    assert "A million tokens cost $10.00 (prompts) and $30.00 (replies)" in page
    total = sum(row["count"] for row in report["requests"])
    assert re.search(rf'<th scope="row">all</th><th></th><td>{total}</td>', page)
    assert any(row["solution"].splitlines()[0] in html.unescape(page) for row in rows_in(settings.out))
