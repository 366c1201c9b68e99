from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.config.device_mapping import parse_device_mapping


@pytest.mark.parametrize(
    ("written", "devices"),
    [
        ("list(range(0,8))", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("range(4)", [0, 1, 2, 3]),
        ("range(0, 8, 2)", [0, 2, 4, 6]),
        ("range(3, -1, -1)", [3, 2, 1, 0]),
        ("[0, 1]", [0, 1]),
        ("0,1,2", [0, 1, 2]),
        ("(4,5)", [4, 5]),
        (" list(range(0,2)) + list(range(4,6)) ", [0, 1, 4, 5]),
        ([2, 3], [2, 3]),
        (None, None),
    ],
)
def test_every_way_of_writing_devices_is_understood(written: object, devices: list[int] | None) -> None:
    assert parse_device_mapping(written) == devices


@pytest.mark.parametrize(
    "written",
    [
        "__import__('os').system('touch /tmp/owned')",
        "open('/etc/passwd').read()",
        "[x for x in range(3)]",
        "list(map(print, range(3)))",
        "range(*[3])",
        "range(stop=3)",
        "range(10**9)",
        "range(99999999)",
        "[0] * 1000000000",
        "(lambda: [0])()",
        "[0, 'a']",
        "[0, 1.5]",
        "[True, False]",
        "[0, 0]",
        "[-1]",
        "[]",
        "range(0)",
        "range(1, 5, 0)",
        "8",
        "'0'",
        "list(",
        "",
        "(" * 1000,
        "\x00",
        8,
        True,
        {"a": 1},
        [[0]],
        ["0"],
    ],
)
def test_anything_else_is_refused_and_nothing_is_run(written: object) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse_device_mapping(written)


@given(st.text(alphabet="0123456789,[]()+ -rangelist'_.*", max_size=40))
def test_no_text_does_more_than_fail(written: str) -> None:
    try:
        devices = parse_device_mapping(written)
    except ValueError:
        return
    assert devices is not None
    assert all(type(device) is int and device >= 0 for device in devices)


@given(st.lists(st.integers(0, 1000), min_size=1, unique=True))
def test_a_list_survives_being_written_as_text(devices: list[int]) -> None:
    assert parse_device_mapping(str(devices)) == devices
