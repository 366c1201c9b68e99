"""Which teacher ranks a student rank asks."""

from hypothesis import given
from hypothesis import strategies as st

from limbeck.teachers import route


@given(st.integers(1, 9), st.integers(1, 9))
def test_ranks_that_share_a_model_are_all_asked_equally_often(students, teachers):
    asked = [0] * teachers
    for student in range(students):
        way = route(student, students, teachers, in_step=True)
        assert len(way.mine) == 1
        for rank in (*way.mine, *way.idle):
            asked[rank] += 1
    assert len(set(asked)) == 1


@given(st.integers(1, 9), st.integers(1, 9))
def test_copies_are_shared_out_and_none_is_left_without_work(students, teachers):
    ways = [route(student, students, teachers, in_step=False) for student in range(students)]
    assert {rank for way in ways for rank in way.mine} == set(range(min(teachers, max(students, teachers))))
    assert all(way.mine and not way.idle for way in ways)
    sizes = [len(way.mine) for way in ways]
    assert max(sizes) - min(sizes) <= 1
