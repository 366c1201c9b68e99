import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.data import IGNORE, tokenize_files, tokenize_rows
from limbeck.errors import LimbeckError

END = "<|endoftext|>"
ROWS = [{"question": f"How many eggs has Ann, if {i}?", "answer": f"She has {i} eggs. " * (i + 1)} for i in range(8)]
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=30).filter(str.strip)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def learnt(tokenizer, labels):
    return tokenizer.decode(labels[labels != IGNORE])


@pytest.mark.parametrize("template", ["base", "chatml", None])
@pytest.mark.parametrize("kind", [{}, {"bos": True}, {"trim_offsets": True}, {"bos": True, "trim_offsets": True}])
def test_labels_are_the_next_supervised_token_and_decode_to_the_answer(build_tokenizer, kind, template):
    tokenizer = build_tokenizer(**kind)
    end = "<|im_end|>" if template == "chatml" else END

    @given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))
    @settings(max_examples=25, deadline=None)
    def check(pairs):
        rows = [{"question": question, "answer": answer} for question, answer in pairs]
        examples, report = tokenize_rows(rows, tokenizer, template=template, sequence_length=1024)
        assert (len(examples), report.rows) == (len(rows), len(rows))
        for i, (_, answer) in enumerate(pairs):
            tokens, labels = examples.row(i)
            supervised = labels != IGNORE
            assert labels[-1] == IGNORE
            assert (labels[:-1][supervised[:-1]] == tokens[1:][supervised[:-1]]).all()
            # A token may straddle the boundary, and then it belongs to the answer.
            assert learnt(tokenizer, labels).endswith(answer + end)
            assert len(learnt(tokenizer, labels)) <= len(answer + end) + 16
            assert examples.num_supervised[i] == supervised.sum()

    check()


@pytest.mark.parametrize("kind", [{}, {"trim_offsets": True}])
def test_blanks_at_the_boundaries_stay_on_their_side(build_tokenizer, kind):
    tokenizer = build_tokenizer(**kind)
    jinja = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'user' %}<|im_start|>{% endif %}{% endfor %}"
    jinja = jinja.replace("<|im_start|>", "   <|im_start|>   ")
    examples, _ = tokenize_rows([{"question": "How", "answer": "   eggs   !   "}], tokenizer, template=jinja)
    assert learnt(tokenizer, examples.row(0)[1]) == f"   eggs   !{END}"


def test_a_token_across_the_boundary_is_supervised(build_tokenizer):
    tokenizer = build_tokenizer()
    examples, _ = tokenize_rows([{"question": "eg", "answer": "gs"}], tokenizer, template="empty")
    assert learnt(tokenizer, examples.row(0)[1]) in ("eggs" + END, "gs" + END, "ggs" + END)
    whole, _ = tokenize_rows([{"question": " eg", "answer": "gs"}], tokenizer, template="empty")
    assert " eggs" in tokenizer.get_vocab() or "Ġeggs" in tokenizer.get_vocab()
    tokens, labels = whole.row(0)
    # " eggs" is one token; it stands first, where nothing can predict it, so only the end is left to learn.
    assert tokenizer.decode(tokens) == " eggs" + END
    assert labels.tolist() == [tokenizer.eos_token_id, IGNORE]


def test_a_metaspace_tokenizer_learns_the_whole_answer(build_tokenizer):
    tokenizer = build_tokenizer(metaspace=True)
    examples, _ = tokenize_rows([{"question": "How many?", "answer": "She has 12 eggs."}], tokenizer, template="chatml")
    assert learnt(tokenizer, examples.row(0)[1]).strip() == "She has 12 eggs.<|im_end|>"


def test_every_assistant_turn_is_supervised_and_nothing_else(tokenizer):
    turns = [("user", "two?"), ("assistant", "three"), ("user", "more?"), ("assistant", "five")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    examples, report = tokenize_rows([row], tokenizer, template="chatml")
    assert learnt(tokenizer, examples.row(0)[1]) == "three<|im_end|>five<|im_end|>"
    assert report.files[0].format == "messages"


def test_the_end_token_is_supervised_although_it_is_also_the_padding_token(tokenizer):
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    examples, _ = tokenize_rows(ROWS, tokenizer)
    for i in range(len(examples)):
        labels = examples.row(i)[1]
        assert labels[labels != IGNORE][-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("template", ["base", "chatml", "native"])
def test_bos_is_there_once(native_tokenizer, template):
    examples, _ = tokenize_rows(ROWS, native_tokenizer, template=template)
    for i in range(len(examples)):
        tokens = examples.row(i)[0]
        assert tokens[0] == native_tokenizer.bos_token_id
        assert (tokens == native_tokenizer.bos_token_id).sum() == 1


def test_distill_on_prompt_supervises_all_but_the_first_token(tokenizer):
    examples, _ = tokenize_rows(ROWS, tokenizer, template="chatml", distill_on_prompt=True)
    for i in range(len(examples)):
        tokens, labels = examples.row(i)
        assert labels.tolist() == [*tokens[1:].tolist(), IGNORE]


CHAT = [
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "three", "weight": 0},
    {"role": "user", "content": "more?"},
    {"role": "assistant", "content": "five", "weight": 0.5},
]


def test_weights_of_turns_reach_the_examples_through_the_cache_too(tmp_path, tokenizer):
    plain = {"messages": [{key: turn[key] for key in ("role", "content")} for turn in CHAT]}
    path = write(tmp_path / "chat.jsonl", [{"messages": CHAT}, plain])
    for _ in range(2):
        examples, _ = tokenize_files([path], tokenizer, template="chatml", cache_dir=tmp_path / "cache")
        (_, labels), weighed = examples.row(0), examples.weights[: examples.offsets[1]]
        assert learnt(tokenizer, labels) == "five<|im_end|>"
        assert set(weighed[labels != IGNORE]) == {0.5}
        assert set(weighed[labels == IGNORE]) == {0}
        _, labels = examples.row(1)
        assert (examples.weights[examples.offsets[1] :] == (labels != IGNORE)).all()
    path = write(tmp_path / "plain.jsonl", [plain])
    assert tokenize_files([path], tokenizer, template="chatml", cache_dir=tmp_path / "cache")[0].weights is None


def test_a_turn_of_weight_zero_is_not_supervised_even_with_prompts(tokenizer):
    examples, _ = tokenize_rows([{"messages": CHAT}], tokenizer, template="empty", distill_on_prompt=True)
    tokens, labels = examples.row(0)
    assert learnt(tokenizer, labels) == tokenizer.decode(tokens[1:]).replace("three" + END, "")


def test_train_on_last_supervises_only_the_last_answer(tokenizer):
    rows = [{"messages": [{key: turn[key] for key in ("role", "content")} for turn in CHAT]}]
    examples, _ = tokenize_rows(rows, tokenizer, template="chatml", train_on="last")
    assert learnt(tokenizer, examples.row(0)[1]) == "five<|im_end|>"


def test_a_row_that_needs_two_contexts_becomes_two_sequences(tokenizer):
    rows = [{"messages": [{key: turn[key] for key in ("role", "content")} for turn in CHAT]}]
    examples, report = tokenize_rows(rows, tokenizer, template="qwen3")
    think = "<think>\n\n</think>\n\n"
    assert [learnt(tokenizer, examples.row(i)[1]) for i in range(len(examples))] == [
        f"{think}three<|im_end|>",
        f"{think}five<|im_end|>",
    ]
    assert (report.rows, report.rewritten, report.texts) == (1, 1, 2)
    assert "1 rows" in str(report)
    assert "1 rows are written as 2 texts" in str(report)
    assert "texts" not in str(tokenize_rows(rows, tokenizer, template="chatml")[1])


def test_long_rows_are_cut_and_rows_without_answer_dropped_and_both_counted(tokenizer):
    full, _ = tokenize_rows(ROWS, tokenizer)
    prompts = [int(np.argmax(full.row(i)[1] != IGNORE)) + 1 for i in range(len(full))]
    limit = max(prompts) + 3
    rows = [*ROWS, {"question": "How many? " * 50, "answer": "5"}]
    examples, report = tokenize_rows(rows, tokenizer, sequence_length=limit)
    assert report.rows == 9
    assert len(examples) == 8
    assert list(report.dropped.values()) == [1]
    assert report.truncated == int((full.lengths > limit).sum()) > 0
    assert examples.lengths.max() == limit
    assert report.tokens == examples.lengths.sum() == len(examples.tokens)
    assert report.supervised_tokens == (examples.labels != IGNORE).sum()
    for i in range(8):
        cut, labels = examples.row(i)
        assert cut.tolist() == full.row(i)[0][:limit].tolist()
        assert labels[-1] == IGNORE
    for words in ("9 rows", "template: base", f"truncated to {limit}", "1 dropped"):
        assert words in str(report)


def test_data_without_supervised_tokens_is_refused(tokenizer):
    with pytest.raises(LimbeckError, match="raise sequence_length"):
        tokenize_rows(ROWS, tokenizer, sequence_length=3)
    with pytest.raises(LimbeckError, match="rows holds no rows"):
        tokenize_rows([], tokenizer)
    with pytest.raises(LimbeckError, match="sequence_length = 1"):
        tokenize_rows(ROWS, tokenizer, sequence_length=1)


def test_a_slow_tokenizer_is_refused(tokenizer):
    class Slow:
        is_fast = False
        name_or_path = "old/model"

    with pytest.raises(LimbeckError, match=r"old/model \(Slow\) is not a fast one"):
        tokenize_rows(ROWS, Slow())


def test_all_rows_are_checked_and_the_bad_one_is_named(tmp_path, tokenizer):
    path = write(tmp_path / "train.jsonl", [*ROWS * 300, {"question": "q"}])
    with pytest.raises(LimbeckError, match=rf"{path}:2401 has no \"answer\""):
        tokenize_files([path], tokenizer)


def test_files_may_have_different_formats(tmp_path, tokenizer):
    chat = {"conversations": [{"from": "human", "value": "two?"}, {"from": "gpt", "value": "five"}]}
    files = [write(tmp_path / "a.jsonl", ROWS), write(tmp_path / "b.jsonl", [chat])]
    done = []
    examples, report = tokenize_files([tmp_path / "*.jsonl"], tokenizer, progress=done.append)
    assert [(file.path, file.format, file.rows) for file in report.files] == [
        (str(files[0]), "question/answer", 8),
        (str(files[1]), "conversations", 1),
    ]
    assert learnt(tokenizer, examples.row(8)[1]) == "five" + END
    assert done == [8, 9]


def same(one, other):
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("tokens", "labels", "offsets"))


def test_a_cache_hit_gives_the_same_and_tokenises_nothing(tmp_path, tokenizer):
    path, cache = write(tmp_path / "train.jsonl", ROWS), tmp_path / "cache"
    plain = tokenize_files([path], tokenizer)
    first = tokenize_files([path], tokenizer, cache_dir=cache)
    calls = []
    moved = path.rename(tmp_path / "moved.jsonl")
    tokenizer(["one", "one two"], padding=True, truncation=True, max_length=2)  # leaves traces in the tokenizer
    second = tokenize_files([moved], tokenizer, cache_dir=cache, progress=calls.append)
    assert same(plain[0], first[0])
    assert same(first[0], second[0])
    assert plain[1] == first[1]
    assert second[1].files[0].path == str(moved)
    assert calls == []
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"template": "chatml"},
        {"template_kwargs": {"eos_token": "!"}},
        {"sequence_length": 30},
        {"distill_on_prompt": True},
        {"default_system": "be brief"},
        {"train_on": "last"},
        {"question_key": "answer", "answer_key": "question"},
    ],
)
def test_a_changed_setting_misses_the_cache(tmp_path, tokenizer, change):
    path = write(tmp_path / "train.jsonl", ROWS)
    tokenize_files([path], tokenizer, cache_dir=tmp_path / "cache")
    tokenize_files([path], tokenizer, cache_dir=tmp_path / "cache", **change)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_changed_byte_or_tokenizer_misses_the_cache(tmp_path, build_tokenizer):
    path, cache = write(tmp_path / "train.jsonl", ROWS), tmp_path / "cache"
    for expected, tokenizer in enumerate(
        [build_tokenizer(), build_tokenizer(vocab_size=300), build_tokenizer(eos_token="<|im_end|>")], start=1
    ):
        tokenize_files([path], tokenizer, cache_dir=cache)
        assert len(list(cache.iterdir())) == expected
    path.write_text(path.read_text().replace("Ann", "Eve", 1))
    examples, _ = tokenize_files([path], build_tokenizer(), cache_dir=cache)
    assert len(list(cache.iterdir())) == 4
    assert "Eve" in build_tokenizer().decode(examples.row(0)[0])


def test_a_damaged_cache_raises_an_error(tmp_path, tokenizer):
    path, cache = write(tmp_path / "train.jsonl", ROWS), tmp_path / "cache"
    tokenize_files([path], tokenizer, cache_dir=cache)
    (folder,) = cache.iterdir()
    os.truncate(folder / "labels.npy", 150)
    with pytest.raises(LimbeckError, match=rf"{folder} is damaged .* delete that folder"):
        tokenize_files([path], tokenizer, cache_dir=cache)


def test_a_cache_that_cannot_be_written_raises_an_error(tmp_path, tokenizer):
    path = write(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(LimbeckError, match="cannot be kept in"):
        tokenize_files([path], tokenizer, cache_dir=path)


def test_a_full_disk_raises_an_error_and_leaves_no_files(tmp_path, tokenizer):
    resource = pytest.importorskip("resource")
    path, cache = write(tmp_path / "train.jsonl", ROWS), tmp_path / "cache"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))  # room for the head of an array
    try:
        with pytest.raises(LimbeckError, match=r"File too large.*free some space"):
            tokenize_files([path], tokenizer, cache_dir=cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(cache.iterdir()) == []


def test_a_report_of_many_files_stays_short(tmp_path, tokenizer):
    for i in range(9):
        write(tmp_path / f"part-{i}.jsonl", ROWS)
    _, report = tokenize_files([tmp_path / "*.jsonl"], tokenizer)
    assert "72 rows from" in str(report)
    assert "and 6 more files" in str(report)
    assert "part-8" not in str(report)


def test_long_rows_can_be_dropped(tokenizer):
    full, _ = tokenize_rows(ROWS, tokenizer)
    limit = int(np.sort(full.lengths)[4])
    examples, report = tokenize_rows(ROWS, tokenizer, sequence_length=limit, overlong="drop")
    assert len(examples) == 5
    assert report.dropped == {f"longer than {limit} tokens": 3}
    assert report.truncated == report.split == 0


def test_split_rows_lose_no_token_and_no_target(tokenizer):
    full, _ = tokenize_rows(ROWS, tokenizer)
    limit = 9
    examples, report = tokenize_rows(ROWS, tokenizer, sequence_length=limit, overlong="split")
    assert examples.lengths.max() == limit
    assert report.split == int((full.lengths > limit).sum())
    assert report.supervised_tokens == int(full.num_supervised.sum())
    pieces = sum(-(-int(length) // limit) for length in full.lengths)
    assert len(examples) + sum(report.dropped.values()) == pieces
    whole = {(*map(tuple, (full.tokens[i : i + limit].tolist(), full.labels[i : i + limit].tolist())),)
             for row in range(8) for i in range(full.offsets[row], full.offsets[row + 1], limit)}  # fmt: skip
    for row in range(len(examples)):
        tokens, labels = (part.tolist() for part in examples.row(row))
        assert any(tuple(tokens) == t[: len(tokens)] and tuple(labels) == n[: len(labels)] for t, n in whole)


def test_an_answer_that_loses_its_end_is_counted(tokenizer):
    turns = [("user", "two?"), ("assistant", "three eggs"), ("user", "more eggs?"), ("assistant", "five eggs")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    full, _ = tokenize_rows([row], tokenizer, template="chatml")
    supervised = np.flatnonzero(full.labels != IGNORE) + 1
    gap = int(np.flatnonzero(np.diff(supervised) > 1)[0])
    first_end, second_begin = int(supervised[gap]), int(supervised[gap + 1])
    for limit in range(2, len(full.tokens)):
        inside = supervised[0] < limit <= first_end or second_begin < limit
        try:
            _, report = tokenize_rows([row], tokenizer, template="chatml", sequence_length=limit)
        except LimbeckError:
            assert limit <= supervised[0]
            continue
        assert (report.truncated, report.cut_answers) == (1, int(inside)), limit
        assert ("so its end is not learned" in str(report)) == inside


def test_weights_of_rows_multiply_what_is_learned(tokenizer):
    rows = [{**row, "weight": 0.5} if i == 3 else {**row, "weight": 0} if i == 5 else row for i, row in enumerate(ROWS)]
    examples, report = tokenize_rows(rows, tokenizer)
    assert len(examples) == 7
    assert report.dropped == {"no supervised token": 1}
    for i in range(7):
        weights = examples.weights[examples.offsets[i] : examples.offsets[i + 1]]
        assert weights.tolist() == [(0.5 if i == 3 else 1) * (label != IGNORE) for label in examples.row(i)[1]]
    assert tokenize_rows(ROWS, tokenizer)[0].weights is None


def test_a_late_weight_is_the_same_on_disk(tmp_path, tokenizer):
    path = write(tmp_path / "train.jsonl", [*ROWS * 300, {**ROWS[0], "weight": 2}])
    memory, _ = tokenize_files([path], tokenizer)
    disk, _ = tokenize_files([path], tokenizer, cache_dir=tmp_path / "cache")
    assert np.array_equal(memory.weights, disk.weights)
    assert np.array_equal(memory.labels != IGNORE, memory.weights > 0)


def test_an_unknown_setting_is_refused(tokenizer):
    with pytest.raises(LimbeckError, match="overlong = keep is not one of truncate, drop, split"):
        tokenize_rows(ROWS, tokenizer, overlong="keep")
    with pytest.raises(TypeError, match="lenght"):
        tokenize_rows(ROWS, tokenizer, lenght=3)


def test_a_template_file_edited_in_place_misses_the_cache(tmp_path, tokenizer):
    path, template = write(tmp_path / "train.jsonl", ROWS), tmp_path / "mine.jinja"
    lengths = []
    for end in ("", " Well done!"):
        template.write_text("{% for m in messages %}{{ m.content }}" + end + "{% endfor %}")
        examples, _ = tokenize_files([path], tokenizer, template=str(template), cache_dir=tmp_path / "cache")
        lengths.append(int(examples.lengths.sum()))
    assert lengths[0] < lengths[1]
