import pytest

from limbeck.data.rows import Conversation
from limbeck.data.templates import check_template_kwargs, render, resolve_template
from limbeck.errors import LimbeckError

QA = [{"role": "user", "content": "q?"}, {"role": "assistant", "content": "yes"}]
LONG = [
    {"role": "system", "content": "sys"},
    *QA,
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "no"},
]
END = "<|endoftext|>"


def rendered(messages, template, tokenizer, **kwargs):
    (out,) = render(Conversation(messages), resolve_template(template, tokenizer), tokenizer, kwargs, "f.jsonl:1")
    return out.text, [out.text[start:end] for start, end, _ in out.spans]


@pytest.mark.parametrize(
    ("template", "text", "learnt"),
    [
        ("base", f"sys\nq?\nyes{END}more\nno{END}", [f"yes{END}", f"no{END}"]),
        ("empty", f"sysq?yes{END}moreno{END}", [f"yes{END}", f"no{END}"]),
        (
            "chatml",
            "<|im_start|>system\nsys<|im_end|>\n<|im_start|>user\nq?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
            "<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\nno<|im_end|>",
            ["yes<|im_end|>", "no<|im_end|>"],
        ),
    ],
)
def test_named_templates_learn_every_answer_with_its_end(tokenizer, template, text, learnt):
    assert rendered(LONG, template, tokenizer) == (text, learnt)


def test_without_a_template_the_tokenizers_own_is_used_if_there_is_one(tokenizer, native_tokenizer):
    assert resolve_template(None, tokenizer).name == "base"
    assert resolve_template(None, native_tokenizer) == resolve_template("native", native_tokenizer)
    text, learnt = rendered(LONG, None, native_tokenizer)
    assert text == f"<s>[system] sys\n[user] q?\n[assistant] yes{END}\n[user] more\n[assistant] no{END}"
    assert learnt == [f"yes{END}", f"no{END}"]


def test_an_answer_that_nothing_ends_gets_eos(tokenizer):
    jinja = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    jinja += "{% if add_generation_prompt %}assistant: {% endif %}"
    assert rendered(QA, jinja, tokenizer) == (f"user: q?\nassistant: yes{END}", [f"yes{END}"])


def test_an_unknown_end_marker_is_followed_by_eos(build_tokenizer):
    text, learnt = rendered(QA, "chatml", build_tokenizer(special=["<s>", END]))
    assert learnt == [f"yes<|im_end|>{END}"]
    assert text.endswith(learnt[0])


def test_turns_after_the_last_answer_are_kept_but_not_learnt(tokenizer):
    text, learnt = rendered([*QA, {"role": "user", "content": "thanks"}], "base", tokenizer)
    assert (text, learnt) == (f"q?\nyes{END}thanks", [f"yes{END}"])


def test_a_tokenizer_without_eos_and_a_template_without_end_are_refused(build_tokenizer):
    with pytest.raises(LimbeckError, match="no eos_token"):
        rendered(QA, "base", build_tokenizer(eos_token=None))


def test_a_named_template_writes_bos_exactly_if_the_tokenizer_does(tokenizer, native_tokenizer):
    assert rendered(QA, "base", native_tokenizer)[0].startswith("<s>q?")
    assert rendered(QA, "base", tokenizer)[0].startswith("q?")


def test_a_template_may_be_a_file(tmp_path, tokenizer):
    path = tmp_path / "mine.jinja"
    path.write_text("{% for m in messages %}({{ m['content'] }}){% endfor %}{% if add_generation_prompt %}({% endif %}")
    assert rendered(QA, str(path), tokenizer) == (f"(q?)(yes){END}", [f"yes){END}"])
    with pytest.raises(LimbeckError, match=r"other\.jinja cannot be read"):
        resolve_template(str(tmp_path / "other.jinja"), tokenizer)


def test_template_kwargs_reach_the_template(tokenizer):
    jinja = "{{ mood }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert rendered(QA, jinja, tokenizer, mood="happy ")[0].startswith("happy q?")
    with pytest.raises(LimbeckError, match=r"template_kwargs\.tokenize"):
        check_template_kwargs({"tokenize": True})


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    only_last = (
        "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    rendered(QA, only_last, tokenizer)
    with pytest.raises(LimbeckError, match=r"f\.jsonl:1: the chat template .* turn 2 .*chatml"):
        rendered(LONG, only_last, tokenizer)
    thinks = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
    with pytest.raises(LimbeckError, match="differently"):
        rendered(QA, thinks, tokenizer)


@pytest.mark.parametrize(
    "jinja", ["{{ raise_exception('no system') }}", "{% for %}", "{{ messages[9]['content'] + 'x' }}", "{{ 'a' + 1 }}"]
)
def test_a_failing_template_names_the_row(tokenizer, jinja):
    with pytest.raises(LimbeckError, match=r"f\.jsonl:1: the chat template \(written in the configuration\)"):
        rendered(QA, jinja, tokenizer)


def test_templates_are_rendered_in_a_sandbox(tokenizer):
    with pytest.raises(LimbeckError, match="unsafe"):
        rendered(QA, "{{ messages.__class__.__mro__ }}", tokenizer)


def test_unknown_and_missing_templates_are_told_with_the_choice(tokenizer, build_tokenizer):
    with pytest.raises(LimbeckError, match="vicuna is unknown; use native, base, chatml, empty"):
        resolve_template("vicuna", tokenizer)
    with pytest.raises(LimbeckError, match="set template: base or template: chatml"):
        resolve_template("native", tokenizer)
    with pytest.raises(LimbeckError, match="ambiguous"):
        resolve_template("native", build_tokenizer(chat_template={"a": "x", "b": "y"}))
