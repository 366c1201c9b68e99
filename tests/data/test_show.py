import io
import json

import pytest
from rich.console import Console

from limbeck.data import IGNORE, tokenize_rows
from limbeck.data.rows import Conversation, RowKeys
from limbeck.data.show import find_row, print_row, tokens_of
from limbeck.data.templates import render, resolve_template
from limbeck.errors import LimbeckError

CHAT = [
    {"role": "user", "content": "two?\nor é"},
    {"role": "assistant", "content": "three", "weight": 0},
    {"role": "user", "content": "more?"},
    {"role": "assistant", "content": "five", "weight": 0.5},
]


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("kind", [{}, {"trim_offsets": True}, {"metaspace": True}])
def test_what_is_shown_is_what_is_learnt(build_tokenizer, kind, everything):
    tokenizer = build_tokenizer(**kind)
    template = resolve_template("chatml", tokenizer)
    (rendered,) = render(Conversation(CHAT), template, tokenizer, {}, "")
    limit = len(tokens_of(rendered, tokenizer, 1000, everything)) - 1
    shown = tokens_of(rendered, tokenizer, limit, everything)
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


def printed(chat_file, tokenizer, teacher, color=False, **options):
    out = io.StringIO()
    console = Console(file=out, force_terminal=color, color_system="truecolor" if color else None, width=80)
    settings = {"template_kwargs": {}, "sequence_length": 64, "distill_on_prompt": False, **options}
    found = find_row([chat_file, chat_file], 4, RowKeys("question", "answer"))
    print_row(console, found, tokenizer, resolve_template("chatml", tokenizer), teacher=teacher, **settings)
    return out.getvalue()


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


def test_a_teacher_that_reads_or_writes_differently_is_told(chat_file, tokenizer, native_tokenizer, build_tokenizer):
    text = printed(chat_file, tokenizer, native_tokenizer)
    assert "reads the same tokens" in text
    assert "the teacher's own writes another text from character 1 on" in text
    text = printed(chat_file, tokenizer, build_tokenizer(special=["<|im_end|>", "<|im_start|>", "<|endoftext|>"]))
    assert "tokens differently:" in text
    assert "The tokenizers of student" in text


def test_a_row_that_is_not_there_is_told(chat_file):
    with pytest.raises(LimbeckError, match="--row 3 does not exist: the data has 3 rows"):
        find_row([chat_file], 3, RowKeys("question", "answer"))
