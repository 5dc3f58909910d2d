"""Answers that attack: none is executed, none hangs the grader, and the one after it is graded as ever."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from data_pipeline.answers import Votes, extract, is_equal, symbolic
from eval.grade import is_correct

TEXTS = {
    "power tower": "9^{9^{9}}",
    "boxed power tower": r"\boxed{9^{9^{9^{9}}}}",
    "huge factorial": "1000000!",
    "factorial of factorial": "(((9!)!)!)!",
    "long sum": r"\sum_{k=1}^{10^{10}} \frac{1}{k^2+1}",
    "long product": r"\prod_{k=1}^{10^8} k",
    "hard integral": r"\int_0^1 \frac{\sin(x^x)}{\ln(1+x^{x^x})}dx",
    "huge polynomial": "x^{1000000}-1",
    "deep brackets": "(" * 5000 + "1" + ")" * 5000,
    "shallow brackets": "(" * 140 + "1" + ")" * 140,
    "open boxes": r"\boxed{" * 14_000,
    "open formulas": r"\[" * 50_000,
    "dollars": "$" * 100_001,
    "marks": "The answer is: " * 6000,
    "correct answers": r"our answer is correct \boxed{1} " * 4000,
    "fractions": r"\frac" * 400,
    "roots": r"\sqrt" * 400 + "2",
    "signs": "-" * 1900 + "1",
    "digits": "9" * 100_000,
    "list": "1," * 50_000,
    "short list": "{" + ",".join(f"f({i})" for i in range(60)) + "}",
    "nested tuples": "((1,2),(3,4),(5,6))" * 30,
    "matrix": r"\begin{pmatrix}" + "1&" * 400 + r"\end{pmatrix}",
    "bars": "|" * 900,
    "lines": "a\nb\n" * 30_000,
    "spaces": " " * 100_000,
    "backslashes": "\\" * 1001,
    "control characters": "\x00\x1b[31m\x07",
    "surrogate": "\ud800",
    "other digits": "٣٤ ² Ⅻ",
    "infinity": r"\infty-\infty",
    "division by zero": r"\frac{1}{0}",
    "logarithm of zero": r"\log_0 0",
    "relations": "1<2<3<" * 100,
    "ors": "1 or " * 190,
}
CODE = [
    '__import__("os").system("touch {file}")',
    'eval(\'__import__("os").system("touch {file}")\')',
    'exec("open({file!r}, chr(119)).close()")',
    '(lambda: __import__("subprocess").run(["touch", "{file}"]))()',
    "[c for c in ().__class__.__base__.__subclasses__()][0](open('{file}', 'w'))",
    r"\input{{{file}}}",
    r"\write18{{touch {file}}}",
    r"\text{{$(touch {file})}}",
    "x.__class__.__init__.__globals__['os'].system('touch {file}')",
    "S(\"__import__('os').system('touch {file}')\")",
    "Symbol('x').subs({{}}, open('{file}', 'w'))",
    'f\'{{open("{file}", "w")}}\'',
    "; touch {file} #",
    "`touch {file}`",
]
GOLDS = ["5", r"\frac{\sqrt{3}}{2}", "x^2+2x+1", r"\{1,2\}", r"(-\infty,3)", r"\text{even}", "f(x)+1"]


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXTS)
def test_a_hostile_answer_is_wrong_within_five_seconds(name):
    for kind, golds in (("latex", GOLDS), ("number", ["5"]), ("puzzle", ["2, 3 -> 5"])):
        for gold in golds:
            started = time.monotonic()
            assert not is_correct(TEXTS[name], gold, kind), gold
            assert time.monotonic() - started < 5, gold
    assert is_correct("The answer is: $1+f(x)$", "f(x)+1", "latex")


@pytest.mark.slow
@pytest.mark.parametrize("code", CODE)
def test_no_code_of_an_answer_is_run(code, tmp_path):
    file = tmp_path / "run"
    text = code.format(file=file)
    for response in (text, f"The answer is: {text}", f"\\boxed{{{text}}}", f"${text}$"):
        for gold in ("5", "f(x)+1"):
            is_correct(response, gold, "latex")
            is_correct(response, "5", "number")
        with_gold_as_hostile = is_equal("f(x)", text, "latex")
        assert not with_gold_as_hostile
    assert not file.exists()


def test_what_takes_too_long_is_said_and_the_next_is_compared():
    algebra = symbolic.Algebra()
    with pytest.raises(symbolic.TooHard):
        algebra.same("5", "9^{9^{9}}", seconds=0.3)
    assert algebra.same("1+f(x)", "f(x)+1")
    algebra.close()
    assert is_equal("9^{9^{9}}", "5", "latex") is None


def test_a_process_that_was_killed_is_replaced():
    algebra = symbolic.Algebra()
    assert algebra.same("1+f(x)", "f(x)+1")
    process = algebra._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    algebra.same("1+f(x)", "f(x)+2")  # its fork may still answer
    assert algebra.same("1+f(x)", "f(x)+1")
    algebra.close()


def test_the_process_ends_with_whoever_asks():
    algebra = symbolic.Algebra()
    assert algebra.same("1+f(x)", "f(x)+1")
    process = algebra._process
    assert process is not None and process.stdin is not None
    process.stdin.close()
    assert process.wait(timeout=5) == 0


def test_the_worker_refuses_what_grading_has_no_need_of(tmp_path):
    """The second line of defence, tried by itself: in a process that has it, as nothing can take it off again."""
    import subprocess
    import sys

    from data_pipeline.answers import worker

    for statement in (
        f"open({str(tmp_path / 'x')!r}, 'w')",
        "os.system('true')",
        "subprocess.Popen(['true'])",
        "socket.socket()",
        "os.remove('nothing')",
        "eval('1+1')",
        "exec('1+1')",
    ):
        program = "import os, socket, subprocess, sys, runpy\n"
        program += f"refuse = runpy.run_path({worker.__file__!r})['_refuse']\nsys.addaudithook(refuse)\n"
        program += f"try:\n    {statement}\nexcept PermissionError:\n    print('refused')\n"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
        assert done.stdout == "refused\n", (statement, done.stderr)


def test_forks_of_a_program_that_graded_do_not_read_each_others_verdicts():
    """A pool of forks, as multiprocessing makes it on Linux."""
    assert is_correct("f(x)+1", "1+f(x)", "latex")
    questions = [(f"g(x)+{i}", f"{i + i % 2}+g(x)") for i in range(12)]
    with multiprocessing.get_context("fork").Pool(3) as pool:
        verdicts = pool.starmap(_same_as_latex, questions, chunksize=1)
    assert verdicts == [i % 2 == 0 for i in range(12)]


def _same_as_latex(answer, gold):
    return is_correct(rf"\boxed{{{answer}}}", gold, "latex")


def test_the_start_of_the_process_is_not_an_answers_fault(monkeypatch, tmp_path):
    """As on a busy machine: the process takes longer to start than an answer may take, and two questions follow."""
    slow = tmp_path / "worker.py"
    worker = Path(symbolic.__file__).with_name("worker.py")
    slow.write_text(f"import runpy, time\ntime.sleep(3)\nrunpy.run_path({str(worker)!r}, run_name='__main__')\n")
    monkeypatch.setattr(symbolic, "__file__", str(tmp_path / "symbolic.py"))
    monkeypatch.setattr(symbolic.Questions, "_shared", symbolic.Algebra())
    assert is_equal(r"\lfloor 5.7 \rfloor, \sum_{k=1}^{4} k", "5, 10", "latex") is True
    symbolic.Questions._shared.close()


@pytest.mark.parametrize("kind", ["number", "latex"])
@pytest.mark.parametrize("inside", ["." * 50_000 + "x", "{" * 20_000 + "5" + "}" * 20_000, " " * 90_000 + "x"])
def test_a_long_box_takes_no_longer_for_its_length(kind, inside):
    started = time.process_time()
    response = rf"\boxed{{{inside}}}"
    assert not is_correct(response, "7", kind)
    Votes(kind).of(extract(response, kind).answer)
    assert time.process_time() - started < 2
