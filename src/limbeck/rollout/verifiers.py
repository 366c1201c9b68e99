"""Verifiers: is the answer at the end of a completion the reference answer?

``ExactVerifier`` compares numbers and strings. ``MathVerifier`` also compares expressions, with the library math-verify.
Some expressions take forever to compare. math-verify limits its time with SIGALRM, which works in a main thread only, so
``WorkerPool`` runs it without that limit in other processes and kills those that take too long.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from importlib.util import find_spec
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Protocol

from loky.backend.context import get_context

from limbeck.errors import LimbeckError

TIMEOUT = "timeout"
NO_ANSWER = "no answer found"

_START_SECONDS = 120.0  # for a worker process to import what it needs
_KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows has no SIGKILL; its SIGTERM cannot be ignored either
_CONTEXT = get_context("loky")  # does not import the main module again, so a script needs no main guard


@dataclass(frozen=True)
class Score:
    """The result of one check.

    value: 1 if the answer is right, 0 if it is wrong, None if that is not known. reason: why it is not known:
    ``"timeout"``, ``"no answer found"`` or ``"error: …"``; otherwise empty.
    """

    value: int | None
    reason: str = ""


class Verifier(Protocol):
    """Compares answers with reference answers."""

    def scores(self, answers: Sequence[str], references: Sequence[str]) -> list[Score]:
        """The score of each answer, in order.

        Args:
            answers: whole completions. The answer in one is the content of its last ``\\boxed{…}``, or what follows its last
                ``####``, or if it has neither, the last number (``MathVerifier``: what math-verify extracts). There is no
                answer if that box is not closed, which happens where a completion is cut off.
            references: the right answers, alone or at the end of a solution that marks them in the same way.
        """

    def close(self) -> None:
        """End the worker processes, if there are any."""


class ExactVerifier:
    """Compares numbers by value, without currency signs, thousands separators, percent signs, and units, which are words of
    two letters or more, or one of g, h, l, L, m, s. Other answers are compared as text without spaces and capital letters.
    """

    def scores(self, answers: Sequence[str], references: Sequence[str]) -> list[Score]:
        return [check_exact(answer, reference) for answer, reference in zip(answers, references, strict=True)]

    def close(self) -> None:
        """There are no processes."""


class WorkerPool:
    """Calls a function in worker processes, and kills those that take too long. It may be used from any thread.

    An answer whose check takes too long, raises or ends the process has the value None and the reason. Other answers are not
    affected, because a new process takes its place.

    Args:
        check: scores an answer and a reference; a function of a module, which the processes import.
        workers: number of processes.
        seconds: time limit of one check.
    """

    def __init__(self, check: Callable[[str, str], Score], workers: int = 2, seconds: float = 10.0) -> None:
        self._workers = [_Worker(check, seconds) for _ in range(workers)]
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(workers, "verifier")  # each waits for one process

    def scores(self, answers: Sequence[str], references: Sequence[str]) -> list[Score]:
        return list(self._threads.map(self._score, zip(answers, references, strict=True)))

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.stop()

    def _score(self, pair: tuple[str, str]) -> Score:
        worker = self._idle.get()
        try:
            return worker.score(*pair)
        finally:
            self._idle.put(worker)


class MathVerifier(WorkerPool):
    """Compares mathematical expressions with math-verify: fractions, sets, intervals, equations, units.

    Raises:
        LimbeckError: if math-verify is not installed.
    """

    def __init__(self, workers: int = 2, seconds: float = 10.0) -> None:
        if find_spec("math_verify") is None:
            raise LimbeckError(
                "comparing expressions needs math-verify, which is not installed; pip install 'limbeck[math]', or set "
                "rollout.environment: exact (limbeck eval --verifier exact), which compares numbers and text only."
            )
        super().__init__(check_math, workers, seconds)


class _Worker:
    """A process that checks one answer at a time. It is replaced when it hangs or ends."""

    def __init__(self, check: Callable[[str, str], Score], seconds: float) -> None:
        self._check = check
        self._seconds = seconds
        self._start()

    def score(self, answer: str, reference: str) -> Score:
        self._wait_until_ready()
        try:
            self._connection.send((answer, reference))
            if self._connection.poll(self._seconds):
                score: Score = self._connection.recv()
                return score
            reason = TIMEOUT
        except (EOFError, OSError):
            self._process.join()
            reason = f"error: the worker process ended with exit status {self._process.exitcode}"
        self.stop()
        self._start()
        return Score(None, reason)

    def stop(self) -> None:
        if self._process.is_alive():
            os.kill(self._process.pid, _KILL)
        self._process.join()
        self._connection.close()

    def _start(self) -> None:
        connection, theirs = _CONTEXT.Pipe()
        process = _CONTEXT.Process(target=_work, args=(theirs, self._check, self._seconds), daemon=True)
        try:
            process.start()
        except OSError as error:
            raise LimbeckError(
                f"A process of the verifier could not be started: {error}; free memory or end processes."
            ) from error
        theirs.close()  # so that the end of the process closes the pipe
        self._connection, self._process, self._ready = connection, process, False

    def _wait_until_ready(self) -> None:
        """The time limit of a check must not include the imports of the process."""
        if not self._ready:
            with suppress(EOFError, OSError):
                self._ready = self._connection.poll(_START_SECONDS) and self._connection.recv()
        if not self._ready:
            self.stop()
            status = self._process.exitcode
            self._start()  # for the next answer
            raise LimbeckError(
                f"A process of the verifier did not start (exit status {status}); its message, if it wrote one, is above."
            )


def _work(connection: Connection, check: Callable[[str, str], Score], seconds: float) -> None:
    """The main function of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent decides when to stop
    with suppress(Exception):
        check("1", "1")  # so that the imports of its first call take no time from an answer
    connection.send(True)
    while True:
        try:
            answer, reference = connection.recv()
        except EOFError:  # the parent has ended
            return
        with suppress(AttributeError):  # Windows has no timer
            # The default action of SIGALRM ends a process that hangs and whose parent was killed.
            signal.setitimer(signal.ITIMER_REAL, 2 * seconds)
        try:
            score = check(answer, reference)
        except Exception as error:
            score = Score(None, f"error: {type(error).__name__}: {error}"[:200])
        with suppress(AttributeError):
            signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send(score)


def check_exact(answer: str, reference: str) -> Score:
    """Compare two numbers by value, or two strings without spaces and capital letters."""
    marked = _marked_answer(answer)
    given = _last_number(answer) if marked is None else marked
    if not given:
        return Score(None, NO_ANSWER)
    return Score(int(_normalize(given) == _normalize(_marked_answer(reference) or reference)))


def check_math(answer: str, reference: str) -> Score:
    """Compare two expressions with math-verify, without a time limit."""
    import logging

    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that there is no time limit
    marked = _marked_answer(answer)
    if marked == "":
        return Score(None, NO_ANSWER)
    if marked and check_exact(answer, reference).value == 1:
        return Score(1)

    def parsed(text: str) -> list[object]:
        return parse(text, parsing_timeout=None, raise_on_error=True)

    expected = _marked_answer(reference) or reference
    # math-verify recognises most LaTeX only between dollar signs.
    right = parsed(f"${expected.strip('$ ')}$") or parsed(expected)
    if not right:
        return Score(None, "error: no answer found in the reference")
    given = parsed(f"${marked.strip('$ ')}$") if marked else parsed(answer)
    if not given:
        return Score(None, NO_ANSWER)
    return Score(int(verify(right, given, timeout_seconds=None, raise_on_error=True)))


_BOXED = re.compile(r"\\f?boxed\s*\{")
_BRACE = re.compile(r"\\[{}]|[{}]")
_NUMBER = r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:/\d+)?"
_NUMBERS = re.compile(rf"(?:(?<![\w)}}])-)?{_NUMBER}")  # the minus of 5-2 is not a sign
_TEXT = r"\\(?:text|textbf|mathrm|mbox)\{([^{}]*)\}"
_WORDS = r"(?:(?!(?:pi|and|or)\b)[A-Za-z]{2,}(?:[\s/]+[A-Za-z]+)*|[ghlLms](?:/[A-Za-z]+)?)"
_UNIT = rf"(?:{_TEXT}(?:\^\{{?\d\}}?)?|{_WORDS}(?:\^\d)?)"
_QUANTITY = re.compile(rf"\s*(-?{_NUMBER})\s*(?:\\?%)?\s*{_UNIT}?\s*")
_INVISIBLE = re.compile(r"\\[\s,!;:]|\\?[$€£]|\\(?:left|right)(?![A-Za-z])")


def _marked_answer(text: str) -> str | None:
    """The content of the last ``\\boxed{…}``, empty if it is not closed, or what follows the last ``####`` on its line, without
    Markdown's emphasis; None if there is neither.
    """
    boxes = list(_BOXED.finditer(text))
    if boxes:
        start, depth = boxes[-1].end(), 1
        for brace in _BRACE.finditer(text, start):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                return text[start : brace.start()].strip()
        return ""
    _, mark, rest = text.rpartition("####")
    return rest.strip().partition("\n")[0].lstrip("*_ ").rstrip("*_. ") if mark else None


def _last_number(text: str) -> str | None:
    numbers = _NUMBERS.findall(text)
    return numbers[-1] if numbers else None


def _normalize(answer: str) -> Fraction | str:
    """The value of a number with or without a unit, or the text of another answer."""
    answer = _INVISIBLE.sub("", answer.replace("{,}", ",").replace("−", "-")).strip().rstrip(".")
    answer = re.sub(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", answer)
    quantity = _QUANTITY.fullmatch(answer)
    if quantity:
        with suppress(ValueError, ZeroDivisionError):  # 1.5/2, 1/0, or more digits than Python converts
            return Fraction(quantity[1].replace(",", ""))
    return "".join(re.sub(_TEXT, r"\1", answer).split()).casefold()
