"""Answers are compared with references; those that cannot be checked are reported, and harm no others."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from limbeck.errors import LimbeckError
from limbeck.rollout import verifiers
from limbeck.rollout.verifiers import NO_ANSWER, TIMEOUT, ExactVerifier, MathVerifier, Score, WorkerPool

RIGHT, WRONG = Score(1), Score(0)
GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "test.jsonl"
needs_math_verify = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs math-verify")


def check_behaviour(answer: str, reference: str) -> Score:
    """What a worker process does is written in the answer."""
    if answer == "hang":
        time.sleep(600)
    if answer == "raise":
        raise ValueError("not an expression")
    if answer == "crash":
        os._exit(3)
    if answer == "print":
        print("on standard output")
    return Score(int(answer == reference))


started = False


def start_slowly(answer: str, reference: str) -> Score:
    global started
    if not started:
        time.sleep(1.5)
    started = True
    return Score(1)


def fail_to_start_once(answer: str, reference: str) -> Score:
    failed = Path(os.environ["FAILED"])
    if not failed.exists():
        failed.touch()
        os._exit(5)
    return Score(1)


@pytest.fixture
def pool():
    pool = WorkerPool(check_behaviour, workers=2, seconds=2.0)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def math():
    verifier = MathVerifier(workers=1, seconds=60.0)
    yield verifier
    verifier.close()


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        (r"so \boxed{42}", "42"),
        (r"first \boxed{1}, then \boxed{42}", "42"),
        (r"\boxed{\text{Monday}}", "monday"),
        ("#### 42", "6 * 7 = <<6*7=42>>42\n#### 42"),
        ("She has 12 ducks, and earns $1,234.50.", "1234.5"),
        ("5-2=3", "3"),
        ("it is -3.", "−3"),
        ("which is 8-3", "3"),
        (r"\boxed{1{,}234}", "1,234"),
        (r"\boxed{\$18}", "18"),
        (r"\boxed{50\%}", "50"),
        ("#### 18 dollars per day", "18"),
        (r"\boxed{12\text{ m}^2}", "12"),
        (r"\boxed{\frac{1}{2}}", "0.5"),
        ("**#### 7.**", "7"),
        ("#### **.5**.", "0.5"),
        ("#### 5m", "5"),
        (r"\boxed{5 m/s}", "5"),
    ],
)
def test_the_exact_verifier_accepts(answer, reference):
    assert ExactVerifier().scores([answer], [reference]) == [RIGHT]


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        (r"\boxed{41} is not 42", "42"),
        (r"\boxed{1,2}", "12"),
        (r"\boxed{2x}", "2"),
        (r"\boxed{2 pi}", "2"),
        (r"\boxed{2m n}", "2"),
        (r"\boxed{3 and 4}", "3"),
        (r"\boxed{1/0}", "0"),
        ("9" * 5000, "9"),
        ("Of 42 ducks 41 are left.", "#### 42"),
    ],
)
def test_the_exact_verifier_refuses(answer, reference):
    assert ExactVerifier().scores([answer], [reference]) == [WRONG]


UNFINISHED = [r"42 \boxed{}", "42 #### **", r"\boxed{42", r"\boxed{42} or \boxed{4"]


@pytest.mark.parametrize("answer", ["I do not know.", "", *UNFINISHED])
def test_an_answer_that_is_not_found_is_not_a_wrong_one(answer):
    assert ExactVerifier().scores([answer], ["42"]) == [Score(None, NO_ANSWER)]


def test_every_answer_needs_a_reference():
    with pytest.raises(ValueError, match="shorter"):
        ExactVerifier().scores(["1", "2"], ["1"])


@pytest.mark.processes
def test_a_worker_that_hangs_is_killed_in_time_and_the_others_keep_their_scores(pool):
    pool.scores(["1"] * 4, ["1"] * 4)  # both have started
    first = {worker._process.pid for worker in pool._workers}
    start = time.monotonic()
    scores = pool.scores(["hang", "1", "2", "3", "4"], ["0", "1", "2", "0", "4"])
    assert scores == [Score(None, TIMEOUT), RIGHT, RIGHT, WRONG, RIGHT]
    assert 2.0 <= time.monotonic() - start < 20.0
    assert pool.scores(["1", "2"], ["1", "0"]) == [RIGHT, WRONG]  # by the new process too
    now = {worker._process.pid for worker in pool._workers}
    assert len(first & now) == 1
    assert not any(is_running(pid) for pid in first - now)


@pytest.mark.processes
def test_a_check_that_raises_is_reported_with_its_reason(pool):
    raised = Score(None, "error: ValueError: not an expression")
    assert pool.scores(["raise", "1"], ["0", "1"]) == [raised, RIGHT]


@pytest.mark.processes
def test_a_worker_that_ends_is_reported_and_replaced(pool):
    ended = Score(None, "error: the worker process ended with exit status 3")
    assert pool.scores(["crash", "1", "crash", "2"], ["0", "1", "0", "2"]) == [ended, RIGHT, ended, RIGHT]


@pytest.mark.processes
def test_a_check_that_prints_does_not_disturb_the_scores(pool):
    assert pool.scores(["print", "1"], ["print", "1"]) == [RIGHT, RIGHT]


@pytest.mark.processes
def test_several_threads_may_use_a_pool(pool):
    results = {}

    def check(index):
        answers = [str(index), "hang"] if index == 0 else [str(index), "wrong"]
        results[index] = pool.scores(answers, [str(index)] * 2)

    threads = [threading.Thread(target=check, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {0: [RIGHT, Score(None, TIMEOUT)], **{index: [RIGHT, WRONG] for index in (1, 2, 3)}}


@pytest.mark.processes
def test_close_leaves_no_processes(pool):
    pids = [worker._process.pid for worker in pool._workers]
    assert all(is_running(pid) for pid in pids)
    pool.close()
    assert not any(is_running(pid) for pid in pids)


@pytest.mark.processes
def test_the_imports_of_a_process_take_no_time_from_its_first_answer():
    pool = WorkerPool(start_slowly, workers=1, seconds=1.0)
    assert pool.scores(["1"], ["1"]) == [RIGHT]
    pool.close()


@pytest.mark.processes
def test_a_process_that_does_not_start_is_one_clear_error_and_replaced(monkeypatch, tmp_path):
    monkeypatch.setenv("FAILED", str(tmp_path / "failed"))
    pool = WorkerPool(fail_to_start_once, workers=1)
    with pytest.raises(LimbeckError, match=r"did not start \(exit status 5\)"):
        pool.scores(["1"], ["1"])
    assert pool.scores(["1"], ["1"]) == [RIGHT]
    pool.close()


PARENT = """
import sys, threading, time
sys.path.insert(0, sys.argv[1])
from test_verifiers import check_behaviour
from limbeck.rollout.verifiers import WorkerPool
pool = WorkerPool(check_behaviour, workers=2, seconds=1.0)
pool.scores(["1"] * 4, ["1"] * 4)
pool._workers[0]._connection.send(("hang", "0"))
time.sleep(0.3)
print(*[worker._process.pid for worker in pool._workers], flush=True)
if sys.argv[2] == "killed":
    time.sleep(600)
"""  # without a main guard


@pytest.mark.processes
@pytest.mark.parametrize("how", ["killed", "ended"])
def test_processes_end_with_their_parent_even_if_they_hang(how):
    command = [sys.executable, "-c", PARENT, str(Path(__file__).parent), how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        if how == "killed":
            parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.processes
def test_a_worker_process_imports_no_torch(pool):
    code = "import sys, limbeck.rollout.verifiers; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_without_math_verify_the_error_names_the_package_to_install(monkeypatch):
    monkeypatch.setattr(verifiers, "find_spec", lambda name: None)
    with pytest.raises(LimbeckError, match=r"pip install 'limbeck\[math\]'"):
        MathVerifier()


@needs_math_verify
@pytest.mark.processes
@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        (r"so $x = \boxed{\frac{14}{3}}$", r"\frac{14}{3}", RIGHT),
        (r"The answer is $\frac{28}{6}$.", "14/3", RIGHT),
        (r"\boxed{\sqrt{8}}", r"2\sqrt{2}", RIGHT),
        (r"\boxed{\{2, 1\}}", r"\{1,2\}", RIGHT),
        (r"\boxed{[0, 1)}", "[0,1)", RIGHT),
        (r"\boxed{2x + 1}", "1+2x", RIGHT),
        (r"\boxed{50\%}", "50", RIGHT),
        (r"\boxed{1{,}234}", "#### 1,234", RIGHT),
        (r"\boxed{18 dollars}", "18", RIGHT),
        ("She earns 18 dollars.", "9 * 2 = 18\n#### 18", RIGHT),
        (r"\boxed{\frac{1}{3}}", r"\frac{14}{3}", WRONG),
        (r"\boxed{\{1, 3\}}", r"\{1,2\}", WRONG),
        (r"\boxed{2x}", "2", WRONG),
        (r"\boxed{\infty", "2", Score(None, NO_ANSWER)),
        ("I do not know.", "2", Score(None, NO_ANSWER)),
        (r"\boxed{\frac{1}{0}}", "2", WRONG),
        (r"\boxed{2}", r"\frac{1}{0}", Score(None, "error: ValueError: Can't evaluate nan or zoo")),
        (r"\boxed{2}", "", Score(None, "error: no answer found in the reference")),
    ],
)
def test_the_math_verifier(math, answer, reference, score):
    assert math.scores([answer], [reference]) == [score]


@needs_math_verify
@pytest.mark.processes
def test_an_expression_without_end_is_a_timeout():
    verifier = MathVerifier(workers=2, seconds=3.0)
    tower, right = r"\boxed{9^{9^{9^9}}}", r"\boxed{\frac{2}{4}}"
    assert verifier.scores([tower, right, right], ["5", "1/2", "1/3"]) == [Score(None, TIMEOUT), RIGHT, WRONG]
    verifier.close()


@pytest.mark.processes
@pytest.mark.skipif(not GSM8K.exists(), reason="needs GSM8K")
@pytest.mark.parametrize("kind", ["exact", pytest.param("math", marks=needs_math_verify)])
def test_gsm8k_answers_are_right_for_their_own_question_only(kind, request):
    verifier = ExactVerifier() if kind == "exact" else request.getfixturevalue("math")
    answers = [json.loads(line)["answer"] for line in GSM8K.read_text().splitlines()[:20]]
    finals = [answer.rpartition("#### ")[2] for answer in answers]
    boxed = [f"Therefore it is \\boxed{{{final}}}." for final in finals]
    spoken = [f"Therefore it is ${final}." for final in finals]
    for written in (answers, boxed, spoken):
        assert verifier.scores(written, answers) == [RIGHT] * 20
        others = [*answers[1:], answers[0]]
        assert verifier.scores(written, others) == [
            Score(int(final == other)) for final, other in zip(finals, [*finals[1:], finals[0]], strict=True)
        ]


def is_running(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
