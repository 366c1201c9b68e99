"""Which answers are counted as loops, and the numbers about answers."""

import math

import numpy as np
import pytest

from limbeck.config.schema.rollout import StopIf
from limbeck.errors import StopTraining
from limbeck.train.answer_statistics import AnswerStatistics, StopRule, UnseenStopStrings, ends_in_loop
from limbeck.train.samples import STUDENT, Sample


def test_an_answer_is_a_loop_if_its_end_comes_four_times_over_at_least_twelve_tokens():
    random = np.random.default_rng(0)
    for _ in range(50):
        start, period = random.integers(100, 200, random.integers(0, 30)), random.integers(1, 9)
        block = 1000 + np.arange(period)  # no shorter block is repeated in it
        for times in range(1, 16):
            tokens = np.concatenate([start, np.tile(block, times)]).astype(np.int32)
            assert ends_in_loop(tokens) == (times >= 4 and times * period >= 12), (period, times)
        assert not ends_in_loop(np.append(tokens, 5).astype(np.int32))


def test_answers_are_counted_by_length_and_end():
    texts = [([7], True), ([3] * 12 + [7], True), ([3] * 20, False), (list(range(10, 24)), True)]
    statistics = AnswerStatistics()
    statistics.add([Sample.written(0, 0, STUDENT, (1, 2), text, None, finished) for text, finished in texts[:2]])
    statistics.add([Sample.written(0, 0, STUDENT, (1, 2), text, None, finished) for text, finished in texts[2:]])
    assert statistics.metrics() == {
        "rollout/mean_length": pytest.approx((1 + 13 + 20 + 14) / 4),
        "rollout/min_length": 1, "rollout/max_length": 20, "rollout/truncated_share": 0.25,
        "rollout/repeated_share": 0.5, "rollout/empty_share": 0.25,
    }  # fmt: skip
    assert all(map(math.isnan, AnswerStatistics().metrics().values()))


@pytest.mark.parametrize(("limit", "lengths"), [("mean_length_below", (1, 3)), ("mean_length_above", (5, 5))])
def test_answers_that_are_too_short_or_too_long_in_several_steps_end_the_run(limit, lengths):
    rule = StopRule(StopIf.model_validate({limit: 3, "for_steps": 2}))
    for step, passing in enumerate((True, False, True, True)):
        rule.check(step)
        texts = lengths if passing else (3, 3)  # the limit itself is not passed
        rule.add([Sample.written(0, 0, STUDENT, (1, 2), [7] * length, None, True) for length in texts])
    with pytest.raises(StopTraining, match=f"rollout/mean_length has passed rollout.stop_if.{limit} = 3 in 2 steps"):
        rule.check(4)


def test_a_stop_string_that_no_answer_contains_is_reported_once(recwarn):
    class Letters:
        def decode(self, tokens):
            return "".join(map(chr, tokens))

    unseen = UnseenStopStrings(["ab", "xy"], Letters())
    answers = [Sample.written(0, 0, STUDENT, (1, 2), list(map(ord, "abc")), None, True)] * 400
    for _ in range(4):
        unseen.add(answers)
    (found,) = recwarn.list
    assert "None of the student's first 800 answers contains the stop string 'xy';" in str(found.message)
    unseen.report()
    assert len(recwarn) == 1
