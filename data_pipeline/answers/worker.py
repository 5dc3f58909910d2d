"""A process that compares expressions with math-verify: the one place where computer algebra sees an answer.

Run as a program. Each line on stdin is a JSON list [gold, answer, seconds of CPU time, seconds]; each gets one line on
stdout: true, false, or null where it took more time or memory than it may have. The work is done in a fork, which the
kernel kills at the time limit, in whatever library it hangs; the next fork goes on at once, without importing anew.

What is compared is LaTeX, read by a grammar (latex2sympy2_extended). As a second line of defence the fork cannot
start processes, open connections, write files, or compile source text.
"""

import json
import logging
import os
import resource
import signal
import sys
from typing import Any

_MEMORY = 2 * 2**30
_TOLERANCE = 1e-6  # relative; math-verify rounds to six places, which makes equal of 1e-20 and 2e-20
_FORBIDDEN = tuple(
    """
    os.system os.exec os.fork os.posix_spawn os.spawn os.kill os.remove os.rename os.rmdir os.mkdir os.link os.symlink
    os.putenv subprocess. socket. shutil. ctypes.
""".split()
)
_COMPILERS = ("/dataclasses.py", "/typing.py", "/collections/__init__.py", "/sympy/polys/monomials.py")


def compare(gold: str, answer: str) -> bool:
    """Whether math-verify finds two LaTeX expressions the same, and their values agree. Both without dollar signs."""
    from math_verify import LatexExtractionConfig, parse, verify

    # The expression extraction would call sympy's parse_expr, which evaluates Python.
    extraction = [LatexExtractionConfig(boxed_match_priority=-1)]
    read = [
        parse(f"${text}$", extraction, fallback_mode="no_fallback", parsing_timeout=None) for text in (gold, answer)
    ]
    if not all(read) or not verify(*read, timeout_seconds=None):
        return False
    return _values_agree(read[0][0], read[1][0])


def _number(_: Any, text: str) -> Any:
    """A number from its digits. The reader of the grammar calls sympy.Number, which evaluates the text as Python."""
    import sympy

    text = text.replace(",", "")
    return sympy.Integer(int(text)) if text.isdigit() else sympy.Float(text)


def _values_agree(a: Any, b: Any) -> bool:
    try:
        x, y = complex(a), complex(b)
    except (TypeError, ValueError, AttributeError, OverflowError):
        return True  # no numbers
    return abs(x - y) <= _TOLERANCE * max(abs(x), abs(y))


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: what grading has no need of is an error."""
    if event.startswith(_FORBIDDEN):
        raise PermissionError(event)
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        raise PermissionError(f"{event} {arguments[0]!r}")
    # An import reads what is compiled already; these few compile what libraries say in their own code.
    if event == "compile" and arguments[0] is not None:
        caller = sys._getframe(1).f_code.co_filename
        if not caller.endswith(_COMPILERS):
            raise PermissionError(event)


def _serve() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(_refuse)
    while line := sys.stdin.buffer.readline():
        gold, answer, cpu_seconds, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            verdict: bool | None = compare(gold, answer)
        except MemoryError:
            verdict = None
        except Exception:  # anything that sympy may stumble over: it could not be shown to be the same
            verdict = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        os.write(1, json.dumps(verdict).encode() + b"\n")


def main() -> None:
    from latex2sympy2_extended import latex2sympy2

    latex2sympy2._Latex2Sympy.parse_number = _number
    logging.disable(logging.CRITICAL)
    sys.setrecursionlimit(2000)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the grader's, who then closes stdin
    compare(r"\frac{x}{2}", "0.5x")  # imports what is imported at first use
    compare(r"\sin(x)^2 + \cos(x)^2", "1")
    os.write(1, b"ready\n")
    while True:
        child = os.fork()
        if child == 0:
            _serve()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status == 0:  # stdin was closed
            return
        os.write(1, b"null\n")


if __name__ == "__main__":
    main()
