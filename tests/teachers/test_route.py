"""Which teacher ranks a student rank sends requests to."""

from hypothesis import given
from hypothesis import strategies as st

from limbeck.teachers import route


@given(st.integers(1, 9), st.integers(1, 9))
def test_ranks_that_share_a_model_receive_equally_many_requests(students, teachers):
    received = [0] * teachers
    for student in range(students):
        way = route(student, students, teachers, in_step=True)
        assert len(way.targets) == 1
        for rank in (*way.targets, *way.idle_ranks):
            received[rank] += 1
    assert len(set(received)) == 1


@given(st.integers(1, 9), st.integers(1, 9))
def test_whole_copies_are_divided_evenly_and_all_are_used(students, teachers):
    ways = [route(student, students, teachers, in_step=False) for student in range(students)]
    assert {rank for way in ways for rank in way.targets} == set(range(min(teachers, max(students, teachers))))
    assert all(way.targets and not way.idle_ranks for way in ways)
    sizes = [len(way.targets) for way in ways]
    assert max(sizes) - min(sizes) <= 1
