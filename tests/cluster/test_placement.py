"""Device numbers become places on machines; workers on one device share it."""

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.cluster.placement import plan_placement

MAPPINGS = st.lists(st.lists(st.integers(0, 15), min_size=1, max_size=8, unique=True), min_size=1, max_size=2)


@given(MAPPINGS, st.sampled_from([None, 1, 3, 8]), st.booleans(), st.lists(st.integers(0, 2), min_size=8, max_size=8))
def test_every_worker_has_a_place_on_its_machine_and_no_machine_is_overbooked(mappings, per_node, on_gpus, extra):
    extra = extra[: len(mappings[0])]  # devices of processes that workers of the first group start
    bundles, places = plan_placement(mappings, per_node, on_gpus, extra)
    taken = defaultdict(float)
    machine: dict[int, set[int]] = defaultdict(set)
    for mapping, group in zip(mappings, places, strict=True):
        assert len(group) == len(mapping)
        for number, (device, at) in enumerate(zip(mapping, group, strict=True)):
            more = extra[number] if group is places[0] else 0
            assert at.gpus == 0 or more < at.gpus <= more + 1
            taken[at.bundle] += at.gpus if on_gpus else 1 + more
            machine[0 if per_node is None else device // per_node].add(at.bundle)
    # Devices of one machine are in one bundle, and bundles hold exactly what their workers take.
    assert all(len(found) == 1 for found in machine.values())
    assert len(bundles) == len(machine)
    for place, bundle in enumerate(bundles):
        assert taken[place] == pytest.approx(bundle["GPU" if on_gpus else "CPU"])
