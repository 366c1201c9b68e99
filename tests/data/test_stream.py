import json
import tracemalloc
from collections import Counter
from dataclasses import replace
from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.data import IGNORE, Batch, BatchStream, Examples, StepCounts, StreamSettings, fixed_batches
from limbeck.errors import LimbeckError

PAD = 0
LENGTHS = st.lists(st.integers(2, 20), min_size=8, max_size=60)
PROPERTY = settings(max_examples=40, deadline=None)


def make(lengths):
    """Rows that cannot be confused: all tokens differ, and about half of the positions are supervised."""
    total = sum(lengths)
    tokens = np.arange(1, total + 1, dtype=np.int32)
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    labels = np.full(total, IGNORE, dtype=np.int32)
    for start, stop in pairwise(offsets):
        middle = (start + stop) // 2
        labels[middle - 1 : stop - 1] = tokens[middle:stop]
    return Examples(tokens, labels, offsets)


def stream(examples, rank=0, world_size=1, **changes):
    options = {
        "seed": 7,
        "sequence_length": 24,
        "per_device_batch_size": 8 // world_size,
        "accumulation_steps": 1,
        "packing": False,
        "max_tokens_per_microbatch": 0,
        "length_round": 4,
        "pad_id": PAD,
    }
    return BatchStream(examples, StreamSettings(**{**options, **changes}), rank, world_size)


def documents(batch):
    """(tokens, labels) of every document in a micro-batch; padding is checked on the way."""
    found = []
    for b in range(batch.input_ids.shape[0]):
        tokens, labels = batch.input_ids[b], batch.labels[b]
        real = int((tokens != PAD).sum())
        assert (tokens[real:] == PAD).all()
        assert (labels[real:] == IGNORE).all()
        if batch.position_ids is None:
            starts = [0] if real else []
        else:
            positions = batch.position_ids[b]
            starts = [i for i in range(real) if positions[i] == 0]
            assert batch.documents is not None
            assert list(accumulate((0, *batch.documents))) == [*starts, batch.input_ids.shape[1]]
            jumps = (positions[1:] - positions[:-1] != 1).nonzero().flatten() + 1
            assert [i for i in starts if i] == jumps.tolist()  # a document begins only where one really begins
        for start, stop in pairwise([*starts, real]):
            found.append((tuple(tokens[start:stop].tolist()), tuple(labels[start:stop].tolist())))
    return found


def rows_of(examples):
    return Counter(tuple(map(tuple, (part.tolist() for part in examples.row(i)))) for i in range(len(examples)))


def seen(steps):
    return Counter(document for step in steps for batch in step.micro_batches for document in documents(batch))


def check_counts(step):
    """The counts of a step are those of its own micro-batches."""
    batches = step.micro_batches
    assert step.counts.num_tokens == sum(int((batch.input_ids != PAD).sum()) for batch in batches)
    assert step.counts.num_tokens == sum(batch.num_tokens for batch in batches)
    assert step.counts.num_supervised == sum(int((batch.labels != IGNORE).sum()) for batch in batches)
    assert step.counts.num_slots == sum(batch.input_ids.numel() for batch in batches)


def check_row_ids(examples, batch):
    """Document i of a batch is row ``row_ids[i]`` of the dataset."""
    expected = [tuple(tuple(part.tolist()) for part in examples.row(row)) for row in batch.row_ids]
    assert documents(batch) == expected


MODES = [
    {},
    {"packing": True},
    {"max_tokens_per_microbatch": 48},
    {"packing": True, "max_tokens_per_microbatch": 48},
    {"group_by_length": True, "max_tokens_per_microbatch": 48},
]


@pytest.mark.parametrize("mode", MODES)
@given(lengths=LENGTHS)
@PROPERTY
def test_every_row_comes_exactly_once_in_an_epoch(mode, lengths):
    examples = make(lengths)
    batches = stream(examples, per_device_batch_size=1, **mode)
    assert seen(next(batches) for _ in range(batches.steps_per_epoch)) == rows_of(examples)
    assert batches.position["epoch"] == 1
    step = next(stream(examples, per_device_batch_size=1, **mode))
    for batch in step.micro_batches:
        check_row_ids(examples, batch)
    assert seen(next(batches) for _ in range(batches.steps_per_epoch)) == rows_of(examples)


@pytest.mark.parametrize("mode", MODES)
@given(lengths=st.lists(st.integers(9, 20), min_size=40, max_size=60), accumulation=st.sampled_from([1, 2]))
@PROPERTY
def test_a_step_is_the_same_on_any_number_of_ranks(mode, lengths, accumulation):
    examples = make(lengths)
    steps = {}
    for world_size in (1, 2, 4):
        ranks = [
            stream(
                examples,
                rank,
                world_size,
                accumulation_steps=accumulation,
                per_device_batch_size=8 // world_size // accumulation,
                **mode,
            )
            for rank in range(world_size)
        ]
        for number in range(2):
            parts = [next(rank) for rank in ranks]
            assert len({len(part.micro_batches) for part in parts}) == 1
            if "max_tokens_per_microbatch" not in mode:
                assert len(parts[0].micro_batches) == accumulation
            for part in parts:
                check_counts(part)
            content = seen(parts)
            row_ids = sorted(row for part in parts for batch in part.micro_batches for row in batch.row_ids)
            assert steps.setdefault(number, (content, row_ids)) == (content, row_ids)


@pytest.mark.parametrize("mode", MODES)
@given(lengths=LENGTHS, done=st.integers(0, 12))
@PROPERTY
def test_a_stream_continues_exactly_where_its_position_says(mode, lengths, done):
    examples = make(lengths)
    one = stream(examples, per_device_batch_size=1, **mode)
    for _ in range(done):
        next(one)
    position = json.loads(json.dumps(one.position))
    other = stream(examples, per_device_batch_size=1, **mode)
    other.seek(position)
    assert other.position == position
    for _ in range(5):
        ours, theirs = next(one), next(other)
        for a, b in zip(ours.micro_batches, theirs.micro_batches, strict=True):
            assert torch.equal(a.input_ids, b.input_ids)
            assert torch.equal(a.labels, b.labels)
            assert a.row_ids == b.row_ids != ()


def test_a_position_of_other_data_or_seed_is_refused():
    position = stream(make([5] * 20)).position
    with pytest.raises(LimbeckError, match="rows = 20, and this run has 24"):
        stream(make([5] * 24)).seek(position)
    with pytest.raises(LimbeckError, match="seed = 7, and this run has 8"):
        stream(make([5] * 20), seed=8).seek(position)
    with pytest.raises(LimbeckError, match="rows_per_step = 8, and this run has 4"):
        stream(make([5] * 20), per_device_batch_size=4).seek(position)


def test_epochs_and_seeds_differ_and_without_shuffling_order_is_kept():
    examples = make([5] * 16)
    one = stream(examples)
    first, _, second = next(one), next(one), next(one)
    assert seen([first]) != seen([second])
    assert seen([first]) != seen([next(stream(examples, seed=8))])
    ordered = stream(examples, shuffle=False)
    ids = [next(ordered).micro_batches[0].input_ids[:, 0].tolist() for _ in range(3)]
    assert ids == [list(range(1, 41, 5)), list(range(41, 81, 5)), list(range(1, 41, 5))]


def test_rows_left_over_at_the_end_of_an_epoch_are_skipped():
    examples = make([5] * 19)
    batches = stream(examples)
    assert batches.steps_per_epoch == 2
    assert sum(seen(next(batches) for _ in range(2)).values()) == 16
    assert batches.position["epoch"] == 1


@pytest.mark.parametrize(("packing", "words"), [(False, "7 rows"), (True, "2 packs")])
def test_data_smaller_than_one_step_is_refused_with_the_numbers(packing, words):
    with pytest.raises(LimbeckError, match=rf"{words}, fewer than .* 8 = .* 2 x .* 2 x 2 ranks; lower"):
        stream(make([5] * 7), 0, 2, per_device_batch_size=2, accumulation_steps=2, packing=packing)


@given(lengths=LENGTHS)
@PROPERTY
def test_packs_stay_within_the_sequence_and_waste_little(lengths):
    examples = make(lengths)
    batches = stream(examples, packing=True, per_device_batch_size=1)
    packs = [next(batches).micro_batches[0] for _ in range(batches.steps_per_epoch)]
    assert max(pack.input_ids.shape[1] for pack in packs) <= 24
    assert len(packs) <= 11 / 9 * -(-sum(lengths) // 24) * 2  # best fit leaves no two packs that would fit into one
    fills = sorted(pack.num_tokens for pack in packs)
    assert len(fills) == 1 or fills[0] + fills[1] > 24


def test_packs_come_in_shuffled_order():
    batches = stream(make([24] * 20 + [10] * 20), packing=True, per_device_batch_size=1)
    sizes = [next(batches).num_tokens for _ in range(batches.steps_per_epoch)]
    assert sorted(sizes) == [20] * 10 + [24] * 20
    assert sizes not in (sorted(sizes), sorted(sizes, reverse=True))
    again = [next(batches).num_tokens for _ in range(batches.steps_per_epoch)]
    assert sorted(again) == sorted(sizes)
    assert again != sizes


def test_a_row_longer_than_the_sequence_has_its_own_pack():
    batches = stream(make([30, 5, 5, 5]), packing=True, per_device_batch_size=1)
    sizes = sorted(next(batches).num_tokens for _ in range(batches.steps_per_epoch))
    assert sizes == [15, 30]


@given(lengths=st.lists(st.integers(2, 20), min_size=32, max_size=60), world_size=st.sampled_from([1, 2, 4]))
@PROPERTY
def test_dynamic_micro_batches_stay_within_the_budget(lengths, world_size):
    examples = make(lengths)
    for rank in range(world_size):
        batches = stream(
            examples, rank, world_size, per_device_batch_size=32 // world_size, max_tokens_per_microbatch=40
        )
        assert all(batch.input_ids.numel() <= 40 for batch in next(batches).micro_batches)


@pytest.mark.parametrize(("world_size", "expected"), [(1, 3), (2, 2), (4, 1)])
def test_micro_batches_are_halved_until_every_rank_has_equally_many(world_size, expected):
    examples = make([20] * 12)
    ranks = [
        stream(examples, rank, world_size, per_device_batch_size=12 // world_size, max_tokens_per_microbatch=80)
        for rank in range(world_size)
    ]
    parts = [next(rank) for rank in ranks]
    assert [len(part.micro_batches) for part in parts] == [expected] * world_size
    assert all(batch.num_tokens for part in parts for batch in part.micro_batches)
    assert seen(parts) == rows_of(examples)


def test_a_row_over_the_budget_is_refused_at_once():
    with pytest.raises(LimbeckError, match=r"longest row has 19 tokens \(20 with padding\).* = 16; raise that to 20"):
        stream(make([19] * 10), max_tokens_per_microbatch=16)
    with pytest.raises(LimbeckError, match=r"longest row has 17 tokens \(20 with padding\).* = 18"):
        stream(make([17] * 20), packing=True, max_tokens_per_microbatch=18)


@given(lengths=LENGTHS, length_round=st.integers(1, 16))
@PROPERTY
def test_padded_lengths_are_rounded_but_never_beyond_the_sequence(lengths, length_round):
    examples = make(lengths)
    limit = max(18, max(lengths))
    batches = stream(examples, per_device_batch_size=2, sequence_length=18, length_round=length_round)
    for _ in range(batches.steps_per_epoch):
        (batch,) = next(batches).micro_batches
        longest = int((batch.input_ids != PAD).sum(1).max())
        assert batch.input_ids.shape[1] == min(-(-longest // length_round) * length_round, limit)


def test_ranks_get_rows_of_similar_length_in_every_round():
    examples = make([4, 8, 12, 16, 20, 24, 28, 32] * 4)
    ranks = [
        stream(examples, rank, 2, per_device_batch_size=4, accumulation_steps=4, sequence_length=32)
        for rank in range(2)
    ]
    parts = [next(rank) for rank in ranks]
    assert all(part.num_tokens == part.num_slots for part in parts)  # every micro-batch holds rows of one length
    assert [sum(batch.num_tokens for batch in part.micro_batches) for part in parts] == [4 * 72, 4 * 72]


@given(lengths=LENGTHS, world_size=st.sampled_from([1, 2, 3, 4]), batch_size=st.integers(1, 5))
@PROPERTY
def test_validation_sees_every_row_once_and_ranks_stay_in_step(lengths, world_size, batch_size):
    examples = make(lengths)
    ranks = [
        fixed_batches(examples, batch_size=batch_size, rank=rank, world_size=world_size, pad_id=PAD, length_round=4)
        for rank in range(world_size)
    ]
    assert seen(step for rank in ranks for step in rank) == rows_of(examples)
    for batch in (batch for rank in ranks for step in rank for batch in step.micro_batches):
        check_row_ids(examples, batch)
    for parts in zip(*ranks, strict=True):
        batches = [batch for part in parts for batch in part.micro_batches]
        assert [len(part.micro_batches) for part in parts] == [1] * world_size
        assert all(batch.input_ids.shape[0] <= batch_size for batch in batches)
        for part in parts:
            check_counts(part)


def test_a_validation_rank_without_rows_gets_an_unsupervised_batch():
    part = [
        fixed_batches(make([5]), batch_size=2, rank=rank, world_size=2, pad_id=PAD, length_round=4)[0]
        for rank in range(2)
    ]
    empty = next(p.micro_batches[0] for p in part if p.micro_batches[0].num_tokens == 0)
    assert (empty.labels == IGNORE).all()
    assert empty.input_ids.tolist() == [[PAD] * 4]
    assert empty.row_ids == ()
    assert sorted(step.counts.num_supervised for step in part) == [0, 3]


def lognormal(rows, seed=0):
    """Lengths like those of GSM8K with a template: a middle of 165 tokens, few above 400."""
    return np.clip(np.random.default_rng(seed).lognormal(5.1, 0.36, rows).astype(int), 40, 512).tolist()


def learned(lengths):
    """The same rows with weights: none on positions that are not supervised, some zeros on those that are."""
    examples = make(lengths)
    weights = np.random.default_rng(1).choice([0.0, 0.5, 1.0, 2.0], len(examples.labels)).astype(np.float32)
    return replace(examples, weights=np.where(examples.labels == IGNORE, 0, weights).astype(np.float32))


@pytest.mark.parametrize("mode", MODES)
@given(lengths=st.lists(st.integers(9, 20), min_size=40, max_size=60))
@PROPERTY
def test_weights_follow_their_tokens_and_add_up_to_the_normalizer(mode, lengths):
    examples = learned(lengths)
    weight_of = dict(zip(examples.labels.tolist(), examples.weights.tolist(), strict=True))
    normalizers = set()
    for world_size in (1, 2, 4):
        parts = [next(stream(examples, rank, world_size, **mode)) for rank in range(world_size)]
        batches = [batch for part in parts for batch in part.micro_batches]
        for batch in batches:
            assert batch.weights.dtype == torch.float32
            assert batch.weights.tolist() == [weight_of[i] for i in batch.labels.flatten()[batch.supervised].tolist()]
        for part in parts:
            assert part.normalizer == sum(batch.weights.double().sum().item() for batch in part.micro_batches)
        normalizers.add(sum(part.normalizer for part in parts))
    assert len(normalizers) == 1
    (held_out,) = fixed_batches(examples, batch_size=60, rank=0, world_size=1, pad_id=PAD, length_round=4)
    assert held_out.normalizer == examples.weights.sum(dtype=np.float64)


def test_without_weights_the_normalizer_is_the_number_of_supervised_tokens():
    step = next(stream(make([9, 12, 20] * 8)))
    assert step.normalizer == step.num_supervised > 0
    assert all(batch.weights is None for batch in step.micro_batches)


def test_the_normalizer_does_not_depend_on_the_order_of_the_micro_batches():
    examples = make([9, 12, 20] * 8)
    weights = np.random.default_rng(0).lognormal(0, 8, len(examples.labels)).astype(np.float32)
    examples = replace(examples, weights=np.where(examples.labels == IGNORE, 0, weights).astype(np.float32))
    batches = next(stream(examples, accumulation_steps=3, per_device_batch_size=2)).micro_batches
    counts = StepCounts.of(batches)
    assert counts == StepCounts.of(batches[::-1]) == StepCounts.of((batches[1], batches[2], batches[0]))


def test_a_batch_made_by_hand_has_no_row_ids():
    ids = torch.tensor([[1, 2, 3]])
    assert Batch.of(ids, ids, None, 3).row_ids == ()


@pytest.mark.parametrize("budget", [0, 2048, 4096])
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_packed_ranks_carry_equal_loads_without_padding(world_size, budget):
    examples = make(lognormal(4000))
    ranks = [
        stream(examples, rank, world_size, packing=True, sequence_length=512, per_device_batch_size=8, length_round=1,
               accumulation_steps=2, max_tokens_per_microbatch=budget)
        for rank in range(world_size)
    ]  # fmt: skip
    for _ in range(ranks[0].steps_per_epoch):
        parts = [next(rank) for rank in ranks]
        loads = [sum(batch.num_tokens for batch in part.micro_batches) for part in parts]
        assert max(loads) <= 1.03 * sum(loads) / world_size
        assert all(part.num_slots == part.num_tokens for part in parts)
        assert len({len(part.micro_batches) for part in parts}) == 1
        assert max(batch.input_ids.numel() for part in parts for batch in part.micro_batches) <= (budget or 8 * 512)


def test_packs_that_nothing_fills_are_dealt_evenly():
    examples = make([500, 480, 300, 280] * 40)
    ranks = [
        stream(examples, rank, 4, packing=True, sequence_length=512, per_device_batch_size=4, shuffle=True)
        for rank in range(4)
    ]
    for _ in range(ranks[0].steps_per_epoch):
        loads = [sum(batch.num_tokens for batch in next(rank).micro_batches) for rank in ranks]
        assert max(loads) - min(loads) <= 220


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_padded_ranks_within_a_budget_wait_little_for_each_other(world_size, grouped):
    examples = make(lognormal(4000))
    sizes = {"sequence_length": 512, "per_device_batch_size": 64, "max_tokens_per_microbatch": 2048}
    ranks = [stream(examples, rank, world_size, group_by_length=grouped, **sizes) for rank in range(world_size)]
    ratios, shares = [], []
    for _ in range(ranks[0].steps_per_epoch):
        parts = [next(rank) for rank in ranks]
        loads = [sum(batch.num_tokens for batch in part.micro_batches) for part in parts]
        ratios.append(max(loads) * world_size / sum(loads))
        shares.append([sum(part.num_tokens for part in parts), sum(part.num_slots for part in parts)])
    tokens, slots = np.sum(shares, axis=0)
    assert tokens > (0.97 if grouped else 0.92) * slots
    assert np.mean(ratios) <= 1.01
    assert np.max(ratios) <= 1.03


def test_steps_of_similar_rows_leave_no_length_out_and_keep_no_order_of_length():
    examples = make(lognormal(1000))
    grouped = stream(examples, group_by_length=True, sequence_length=512)
    steps = [next(grouped) for _ in range(grouped.steps_per_epoch)]
    widths = [[len(tokens) for batch in step.micro_batches for tokens, _ in documents(batch)] for step in steps]
    assert sum(map(len, widths)) == 1000
    assert np.mean([max(width) - min(width) for width in widths]) < 30
    means = [np.mean(width) for width in widths]
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.3


@pytest.mark.parametrize("mode", [*MODES, {"packing": True, "packing_algorithm": "modified_first_fit_decreasing"}])
def test_an_epoch_holds_the_rows_that_are_chosen_for_it(mode):
    examples = make([7, 9, 11, 13] * 20)
    chosen = {0: np.arange(0, 80, 2), 1: np.array([*range(1, 80, 2), 1, 1, 3])}  # a row may come more than once
    batches = stream(examples, per_device_batch_size=1, rows_of_epoch=lambda epoch: chosen[epoch % 2], **mode)
    every = [tuple(map(tuple, (part.tolist() for part in examples.row(i)))) for i in range(80)]
    for epoch in range(4):
        assert batches.position["epoch"] == epoch
        position, steps = batches.position, []
        while batches.position["epoch"] == epoch:
            steps.append(next(batches))
        assert seen(steps) == Counter(every[i] for i in chosen[epoch % 2])
        other = stream(examples, per_device_batch_size=1, rows_of_epoch=lambda epoch: chosen[epoch % 2], **mode)
        other.seek(position)
        assert seen([next(other)]) == seen(steps[:1])


def test_a_changed_token_changes_the_checksum_and_mapped_files_are_not_read_whole(tmp_path):
    rows = 40_000
    tokens = np.arange(rows * 256, dtype=np.int32)
    examples = Examples(tokens, tokens.copy(), np.arange(0, rows * 256 + 1, 256, dtype=np.int64))
    position = stream(examples, max_tokens_per_microbatch=0, sequence_length=256).position
    tokens[7] += 1
    with pytest.raises(LimbeckError, match="checksum"):
        stream(examples, sequence_length=256).seek(position)
    tokens[7] -= 1
    np.save(tmp_path / "tokens.npy", tokens)
    mapped = replace(examples, tokens=np.load(tmp_path / "tokens.npy", mmap_mode="r"))
    tracemalloc.start()
    assert stream(mapped, sequence_length=256).position == position
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6 < tokens.nbytes  # what is held is a few numbers for each row


def test_a_position_is_refused_where_rows_come_in_another_order():
    examples = make([7, 9, 11, 13, 5] * 20)

    def modes(**changes):
        return stream(examples, per_device_batch_size=1, packing=True, sequence_length=25, **changes)

    position = modes().position
    modes().seek(position)
    halves = [lambda epoch: np.arange(0, 100, 2), lambda epoch: np.arange(1, 100, 2)]
    for changes in (
        {"packing_algorithm": "modified_first_fit_decreasing"},
        {"shuffle": False},
        {"rows_of_epoch": lambda epoch: np.arange(99, -1, -1)},
    ):
        with pytest.raises(LimbeckError, match=r"order = |steps_per_epoch = "):
            modes(**changes).seek(position)
    with pytest.raises(LimbeckError, match=r"counted with order = .* use the same data, mixture, packing"):
        stream(examples, rows_of_epoch=halves[1]).seek(stream(examples, rows_of_epoch=halves[0]).position)
    with pytest.raises(LimbeckError, match="counted with order = None"):
        modes().seek({name: value for name, value in position.items() if name != "order"})


@pytest.mark.parametrize("mode", MODES)
@given(lengths=st.lists(st.integers(9, 20), min_size=80, max_size=99), done=st.integers(0, 12))
@PROPERTY
def test_a_position_holds_on_another_number_of_ranks(mode, lengths, done):
    examples = make(lengths)
    mode = {**mode, "rows_of_epoch": lambda epoch: np.arange(epoch % 2, len(lengths), 2)}
    four = [stream(examples, rank, 4, **mode) for rank in range(4)]
    for _ in range(done):
        [next(rank) for rank in four]
    (position,) = {json.dumps(rank.position) for rank in four}
    one = stream(examples, **mode)
    one.seek(json.loads(position))
    for _ in range(3):
        assert seen([next(one)]) == seen([next(rank) for rank in four])
