import io
import json
import re
from dataclasses import replace

import pytest
from rich.console import Console

from limbeck.data import IGNORE, Source, TokenizeSettings, Translator, make_encoder, tokenize_files, tokenize_rows
from limbeck.data.show import find_row, print_row, tokens_of
from limbeck.data.sources import Record
from limbeck.errors import LimbeckError

CHAT = [
    {"role": "user", "content": "two?\nor é"},
    {"role": "assistant", "content": "three", "weight": 0},
    {"role": "user", "content": "more?"},
    {"role": "assistant", "content": "five", "weight": 0.5},
]


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("kind", [{}, {"trim_offsets": True}, {"metaspace": True}])
def test_the_shown_tokens_are_those_of_training(build_tokenizer, kind, everything):
    tokenizer = build_tokenizer(**kind)
    encoder = make_encoder(tokenizer, TokenizeSettings(template="chatml", distill_on_prompt=everything))
    _, (rendered,) = encoder.texts_of(Record({"messages": CHAT}, "chat.jsonl", 1), "messages")
    limit = len(tokens_of(rendered, encoder)) - 1
    cut = replace(encoder, settings=replace(encoder.settings, sequence_length=limit))
    shown = tokens_of(rendered, cut)
    examples, _ = tokenize_rows(
        [{"messages": CHAT}], tokenizer, template="chatml", sequence_length=limit, distill_on_prompt=everything
    )
    tokens, labels = examples.row(0)
    assert [token.kind == "cut" for token in shown] == [False] * limit + [True]
    assert [token.id for token in shown if token.kind != "cut"] == tokens.tolist()
    assert [token.kind == "learned" for token in shown[1:limit]] == (labels[:-1] != IGNORE).tolist()
    assert [token.weight for token in shown[1:limit]] == examples.weights[:-1].tolist()
    assert "three" in "".join(token.text for token in shown if token.kind == "masked")


@pytest.fixture
def chat_file(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps({"messages": CHAT}) + "\n" for _ in range(3)))
    return path


def show(sources, index, tokenizer, teacher=None, color=False, ids=False, translator=None, **settings):
    out = io.StringIO()
    console = Console(file=out, force_terminal=color, color_system="truecolor" if color else None, width=80)
    encoder = make_encoder(tokenizer, TokenizeSettings(**settings))
    print_row(console, find_row(sources, index, encoder), encoder, teacher=teacher, translator=translator, ids=ids)
    return out.getvalue()


def printed(chat_file, tokenizer, teacher, **options):
    twice = [Source.named(chat_file), Source.named(chat_file)]
    return show(twice, 4, tokenizer, teacher, template="chatml", **{"sequence_length": 64, **options})


def test_a_row_is_printed_with_its_place_and_kinds(chat_file, tokenizer):
    text = printed(chat_file, tokenizer, tokenizer)
    assert f"{chat_file}:2 (messages), weight 1" in text
    assert "\x1b" not in text
    assert "prompt    ‹<|im_start|>›│" in text
    assert "\nmasked    " in text
    assert "\n×0.5      " in text
    assert "reads the same tokens" in text
    assert "\x1b[" in printed(chat_file, tokenizer, tokenizer, color=True)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert f"‹<|im_end|>›:{end}" in printed(chat_file, tokenizer, None, ids=True)
    assert "none learned, so it is dropped" in printed(chat_file, tokenizer, None, sequence_length=5)


def test_differences_of_the_teacher_are_shown(chat_file, tokenizer, native_tokenizer, build_tokenizer):
    text = printed(chat_file, tokenizer, native_tokenizer)
    assert "reads the same tokens" in text
    assert "the teacher's own renders another text from character 1 on" in text
    text = printed(chat_file, tokenizer, build_tokenizer(special=["<|im_end|>", "<|im_start|>", "<|endoftext|>"]))
    assert "tokens differently:" in text
    assert "The tokenizers of student" in text


def test_a_teacher_with_another_tokenizer_is_shown_with_its_own_tokens(tmp_path, tokenizer, build_tokenizer):
    path = tmp_path / "rows.jsonl"
    row = {"question": "How many eggs?", "answer": "She has 12 eggs. Es süß"}
    path.write_text(json.dumps(row))
    other = build_tokenizer(vocab_size=262, special=["<s>", "</s>"], bos=True, eos_token="</s>", pad_token="</s>")
    translator = Translator(tokenizer, other)
    text = show([Source.named(path)], 0, tokenizer, translator=translator, template="base", ids=True)
    _, teacher = text.split("\nteacher: ")
    (count, aligned, learned, facing) = re.match(
        r"(\d+) tokens of \S+; (\d+) of the student's (\d+) learned tokens are aligned with (\d+) of them, in \d+ spans",
        teacher,
    ).groups()
    assert aligned == learned == re.search(r"student, text: \d+ tokens, (\d+) learned", text)[1]
    shown = re.findall(r":(\d+)(?=[│\n]|$)", teacher)
    assert shown == [str(token) for token in other(f"How many eggs?\n{row['answer']}</s>")["input_ids"]]
    assert int(count) == len(shown)
    compared = teacher[teacher.index("compared") :]
    assert len(re.findall(r":\d+(?=[│\n]|$)", compared)) == int(facing)
    assert re.search(r"span +\S+ = \S+│\S+", teacher)
    assert "text 2 of" in show(
        [Source.named(path)], 0, tokenizer, translator=translator, template="base", sequence_length=12, overlong="split"
    )
    dropped = show(
        [Source.named(path)], 0, tokenizer, translator=translator, template="base", sequence_length=5, overlong="drop"
    )
    assert "teacher" not in dropped[dropped.index("student") :]


def test_a_template_that_the_tokenizer_spells_out_is_noted(chat_file, build_tokenizer):
    text = show([Source.named(chat_file)], 0, build_tokenizer(special=["<|endoftext|>"]), template="chatml")
    assert "note      the tokenizer has no token for <|im_start|> and <|im_end|>, which template: chatml uses" in text


def test_the_handling_of_a_long_row_is_shown(chat_file, tokenizer):
    whole = printed(chat_file, tokenizer, None)
    assert ", in " not in whole
    assert "more than 20, so it is dropped" in printed(chat_file, tokenizer, None, sequence_length=20, overlong="drop")
    split = printed(chat_file, tokenizer, None, sequence_length=20, overlong="split")
    (tokens,) = re.findall(r"text: (\d+) tokens", whole)
    assert f"learned, in {-(-int(tokens) // 20)} pieces" in split
    assert "\ncut " not in split
    assert "\ncut " in printed(chat_file, tokenizer, None, sequence_length=20)
    unread = {"overlong": "drop", "reads_answers": False}  # the prompt of the last answer decides
    assert "more than 20, so it is dropped" in printed(chat_file, tokenizer, None, sequence_length=20, **unread)
    cut = printed(chat_file, tokenizer, None, sequence_length=int(tokens) - 2, **unread)
    assert "\ncut " in cut and "dropped" not in cut


def test_rows_are_counted_through_sources_of_every_kind_as_training_reads_them(tmp_path, tokenizer):
    rows = {
        "qa.csv": "question,answer\nHow many?,12\n",
        "text.jsonl": '{"text": "Das Mädchen."}\n',
        "pairs.jsonl": '{"prompt": "two?", "completion": "three"}\n',
        "tagged.jsonl": '{"question": "a", "answer": "b"}\n',
    }
    for name, text in rows.items():
        (tmp_path / name).write_text(text)
    sources = [Source(path=(str(tmp_path / name),), domain=name.split(".")[0]) for name in rows]
    sources[3] = replace(sources[3], format="prompt_completion")  # a wrong word overrules what the row looks like
    assert f"{tmp_path / 'qa.csv'}:2 (row 0) (question/answer), weight 1, domain qa" in show(sources, 0, tokenizer)
    text = show(sources, 1, tokenizer)
    assert "(text), weight 1, domain text" in text
    assert "on running text: not used" in text
    assert "(prompt/completion)" in show(sources, 2, tokenizer)
    with pytest.raises(LimbeckError, match=r'tagged\.jsonl:1 has no "prompt"'):
        show(sources, 3, tokenizer)
    with pytest.raises(LimbeckError, match=r"tagged\.jsonl:1 has no"):
        tokenize_files(sources, tokenizer)
    with pytest.raises(LimbeckError, match=r'"level" must name the row\'s domain'):
        show(sources, 0, tokenizer, domain_key="level")


def test_a_pretokenised_row_is_shown_in_words(tmp_path, tokenizer, write_corpus):
    ids = tokenizer("two and three", add_special_tokens=False)["input_ids"]
    write_corpus(tmp_path / "corpus", [[5, 6], [*ids, 60_000]])
    text = show([Source.named(tmp_path / "corpus.bin")], 1, tokenizer, tokenizer)
    assert f"{tmp_path / 'corpus.bin'} (row 1) (tokens), weight 1" in text
    assert f"student, text: {len(ids) + 1} tokens, {len(ids)} learned" in text
    assert "unknown: 60000" in text
    assert "three" in text.replace("│", "")


def test_a_row_that_does_not_exist_raises_an_error(chat_file, tokenizer):
    with pytest.raises(LimbeckError, match="--row 3 does not exist: the data has 3 rows"):
        show([Source.named(chat_file)], 3, tokenizer)
