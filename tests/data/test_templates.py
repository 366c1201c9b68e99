import copy
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.data.rows import Conversation
from limbeck.data.templates import NAMED, check_template_kwargs, render, resolve_template
from limbeck.errors import LimbeckError

QA = [{"role": "user", "content": "q?"}, {"role": "assistant", "content": "yes"}]
LONG = [
    {"role": "system", "content": "sys"},
    *QA,
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "no"},
]
END = "<|endoftext|>"
WORDS = st.text("ab c\n.", min_size=1, max_size=12).filter(str.strip)


def texts(conversation, template, tokenizer, kwargs=(), **options):
    """(text, what is learned of it) for each text of a conversation."""
    if not isinstance(conversation, Conversation):
        conversation = Conversation(conversation)
    resolved = resolve_template(template, tokenizer, **options)
    out = render(conversation, resolved, tokenizer, dict(kwargs), "f.jsonl:1")
    return [(one.text, [one.text[start:end] for start, end, weight in one.spans if weight]) for one in out]


def rendered(messages, template, tokenizer, **kwargs):
    (one,) = texts(messages, template, tokenizer, kwargs)
    return one


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


def test_eos_is_appended_to_an_answer_without_an_end_token(tokenizer):
    jinja = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    jinja += "{% if add_generation_prompt %}assistant: {% endif %}"
    assert rendered(QA, jinja, tokenizer) == (f"user: q?\nassistant: yes{END}", [f"yes{END}"])


def test_an_unknown_end_marker_is_followed_by_eos(build_tokenizer):
    text, learnt = rendered(QA, "chatml", build_tokenizer(special=["<s>", END]))
    assert learnt == [f"yes<|im_end|>{END}"]
    assert text.endswith(learnt[0])


def test_turns_after_the_last_answer_are_kept_but_not_supervised(tokenizer):
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
    template = resolve_template(jinja, tokenizer)
    check_template_kwargs({"mood": "happy"}, template)
    for key, sentence in {
        "tokenize": "is set by the renderer itself",
        "mod": "did you mean mood?",
        "enable_thinking": "so it would change nothing; remove it",
    }.items():
        with pytest.raises(LimbeckError, match=rf"template_kwargs\.{key} .*{re.escape(sentence)}"):
            check_template_kwargs({key: True}, template)
    check_template_kwargs({"enable_thinking": False}, resolve_template("qwen3", tokenizer))
    with pytest.raises(LimbeckError, match=r"is not valid Jinja: .*; correct it"):
        check_template_kwargs({}, resolve_template("{% for m in messages %}", tokenizer))


@pytest.mark.parametrize("template", ["chatml", "gemma", "llama3", "mistral", "qwen2_5", "qwen3"])
def test_markers_without_a_token_are_reported(build_tokenizer, template):
    note = resolve_template(template, build_tokenizer(special=["<|endoftext|>"])).note
    written = re.search("no token for (.*), which", note)[1].split(" and ")
    assert all(marker in NAMED[template] for marker in written)
    assert not resolve_template(template, build_tokenizer(special=["<|endoftext|>", *written])).note
    assert not resolve_template("base", build_tokenizer(special=["<|endoftext|>"])).note


def test_an_answer_that_changes_later_is_supervised_in_its_own_text(tokenizer):
    only_last = (
        "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    assert texts(LONG[1:], only_last, tokenizer) == [
        (f"q?yes{END}", [f"yes{END}"]),
        (f"q?moreno{END}", [f"no{END}"]),
    ]


def test_qwen3_shows_each_answer_the_history_that_inference_would_show(tokenizer):
    thought = [{**m, "content": f"<think>\nhm {m['content']}\n</think>\n\n{m['content']}"} for m in (QA[1], LONG[4])]
    messages = [QA[0], thought[0], LONG[3], thought[1]]
    head, ask = "<|im_start|>user\nq?<|im_end|>\n<|im_start|>assistant\n", "<|im_start|>user\nmore<|im_end|>\n"
    first, second = "<think>\nhm yes\n</think>\n\nyes<|im_end|>", "<think>\nhm no\n</think>\n\nno<|im_end|>"
    split = [
        (head + first, [first]),
        (head + "yes<|im_end|>\n" + ask + "<|im_start|>assistant\n" + second, [second]),
    ]
    assert texts(messages, "qwen3", tokenizer) == split
    assert texts(messages, "qwen3", tokenizer, train_on="last") == split[1:]
    apart = [{"role": "assistant", "content": c, "reasoning_content": f"hm {c}"} for c in ("yes", "no")]
    assert texts([QA[0], apart[0], LONG[3], apart[1]], "qwen3", tokenizer) == split
    assert texts([QA[0], {**apart[0], "weight": 0}, LONG[3], apart[1]], "qwen3", tokenizer) == split[1:]


def test_an_answer_continues_after_the_opening_in_the_prompt(tokenizer):
    jinja = (
        "{% for m in messages %}{% set c = m.content.split('</think>')[-1] %}[{{ m.role }}]{{ c }}"
        "{{ eos_token if m.role == 'assistant' }}{% endfor %}{% if add_generation_prompt %}[assistant]<think>\n{% endif %}"
    )
    for content in ("<think>\nhm\n</think>yes", "hm\n</think>yes", "<think>hm\n</think>yes"):
        text = f"[user]q?[assistant]<think>\nhm\n</think>yes{END}"
        assert rendered([QA[0], {"role": "assistant", "content": content}], jinja, tokenizer) == (
            text,
            [f"hm\n</think>yes{END}"],
        )
    with pytest.raises(LimbeckError, match=r"opens <think> for turn 1 .* never closes"):
        rendered(QA, jinja, tokenizer)
    native = tokenizer_with(tokenizer, NAMED["chatml"] + "\n")
    assert rendered([QA[0], {"role": "assistant", "content": "hm</think>yes"}], "longcot_V3", native) == (
        "<|im_start|>user\nq?<|im_end|>\n<|im_start|>assistant\n<think>\nhm</think>yes<|im_end|>",
        ["hm</think>yes<|im_end|>"],
    )


def test_thinking_after_a_prompt_that_disables_it_is_refused(tokenizer):
    thinks = [QA[0], {"role": "assistant", "content": "<think>hm</think>yes"}]
    with pytest.raises(LimbeckError, match=r"turn 1 .* differently in a prompt"):
        texts(thinks, "qwen3", tokenizer, {"enable_thinking": False})
    empty = "<think>\n\n</think>\n\n"
    text = f"<|im_start|>user\nq?<|im_end|>\n<|im_start|>assistant\n{empty}yes<|im_end|>"
    assert rendered(QA, "qwen3", tokenizer, enable_thinking=False) == (text, ["yes<|im_end|>"])
    assert rendered(QA, "qwen3", tokenizer) == (text, [f"{empty}yes<|im_end|>"])


def test_thinking_that_a_template_always_removes_is_still_supervised(tokenizer):
    jinja = NAMED["chatml"].replace("message.content", "message.content.split('</think>')[-1]")
    one = {"role": "assistant", "content": "<think>hm</think>yes"}
    two = {"role": "assistant", "content": "<think>oh</think>no"}
    (first, learnt), (second, learnt_too) = texts([QA[0], one, LONG[3], two], jinja, tokenizer)
    assert learnt + learnt_too == ["<think>hm</think>yes<|im_end|>", "<think>oh</think>no<|im_end|>"]
    assert "hm" in first and "hm" not in second


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("llama3", "<|start_header_id|>system<|end_header_id|>\n\nsys<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
         "q?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n{yes<|eot_id|>}<|start_header_id|>user"
         "<|end_header_id|>\n\nmore<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n{no<|eot_id|>}"),
        ("gemma", "<start_of_turn>user\nsys\n\nq?<end_of_turn>\n<start_of_turn>model\n{yes<end_of_turn>}\n"
         "<start_of_turn>user\nmore<end_of_turn>\n<start_of_turn>model\n{no<end_of_turn>}"),
        ("qwen2_5", "<|im_start|>system\nsys<|im_end|>\n<|im_start|>user\nq?<|im_end|>\n<|im_start|>assistant\n"
         "{yes<|im_end|>}\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n{no<|im_end|>}"),
    ],
)  # fmt: skip
def test_families_are_written_in_their_published_layout(build_tokenizer, template, text):
    ends = [END, "<|im_end|>", "<|eot_id|>", "<end_of_turn>"]
    learnt = [text[text.index("{") + 1 : text.index("}")], text[text.rindex("{") + 1 : text.rindex("}")]]
    plain = text.replace("{", "").replace("}", "")
    assert rendered(LONG, template, build_tokenizer(special=ends)) == (plain, learnt)
    tokenizer = build_tokenizer(special=["<s>", *ends], bos=True)
    assert rendered(LONG, template, tokenizer) == ("<s>" + plain, learnt)


def test_mistral_shows_the_system_message_before_the_last_question(build_tokenizer):
    tokenizer = build_tokenizer(special=["<s>", "</s>", END], bos=True, eos_token="</s>")
    assert texts(LONG[1:], "mistral", tokenizer) == [
        ("<s>[INST] q?[/INST] yes</s>[INST] more[/INST] no</s>", [" yes</s>", " no</s>"])
    ]
    assert texts(LONG, "mistral", tokenizer) == [
        ("<s>[INST] sys\n\nq?[/INST] yes</s>", [" yes</s>"]),
        ("<s>[INST] q?[/INST] yes</s>[INST] sys\n\nmore[/INST] no</s>", [" no</s>"]),
    ]


def test_qwen2_5_brings_its_own_system_message(tokenizer):
    system = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    assert rendered(QA, "qwen2_5", tokenizer)[0].startswith(system + "<|im_start|>user\nq?")


TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
WITH_TOOLS = [
    QA[0],
    {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "3"},
    {"role": "tool", "content": "4"},
    QA[1],
]


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3"])
def test_tools_and_calls_are_rendered_and_results_are_not_supervised(tokenizer, template):
    out = texts(Conversation(WITH_TOOLS, tools=[TOOL]), template, tokenizer)
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    think = "<think>\n\n</think>\n\n" if template == "qwen3" else ""
    assert [piece for _, learnt in out for piece in learnt] == [
        f"{think}{call}\n{call}<|im_end|>",
        f"{think}yes<|im_end|>",
    ]
    text = out[-1][0]
    assert (
        "<|im_start|>user\n<tool_response>\n3\n</tool_response>\n<tool_response>\n4\n</tool_response><|im_end|>\n"
        in text
    )
    assert f"within <tools></tools> XML tags:\n<tools>\n{json.dumps(TOOL)}\n</tools>\n\nFor each function call" in text
    assert len(out) == (
        2 if template == "qwen3" else 1
    )  # Qwen3 drops the empty thinking block of a call in the history


def test_a_row_with_keys_that_the_template_ignores_is_refused(tokenizer):
    for conversation, what in (
        (Conversation(QA, tools=[TOOL]), "tools"),
        (Conversation(WITH_TOOLS), "tool_calls"),
        (Conversation([QA[0], {**QA[1], "reasoning_content": "hm"}]), "reasoning_content"),
    ):
        with pytest.raises(
            LimbeckError, match=rf"f\.jsonl:1 has {what}, which the chat template .*chatml.* does not render"
        ):
            texts(conversation, "chatml", tokenizer)
    with pytest.raises(LimbeckError, match="no tool turns"):
        texts([*QA, {"role": "tool", "content": "3"}, LONG[4]], "gemma", tokenizer)


def tokenizer_with(tokenizer, chat_template):
    changed = copy.copy(tokenizer)
    changed.chat_template = chat_template
    return changed


def test_qwen_names_mean_the_tokenizers_own_template_where_that_is_one(tokenizer, native_tokenizer):
    own = tokenizer_with(tokenizer, NAMED["qwen3"] + "{# mine #}")
    assert resolve_template("qwen3", own).jinja == own.chat_template
    # Others speak ChatML as well, without what makes these names.
    other = tokenizer_with(tokenizer, NAMED["chatml"] + "{# You are SmolLM #}")
    assert resolve_template("qwen3", other).jinja.endswith(NAMED["qwen3"])
    assert resolve_template("qwen2_5", other).jinja.endswith(NAMED["qwen2_5"])
    assert resolve_template("qwen3", native_tokenizer).jinja.endswith(NAMED["qwen3"])


def test_the_long_cot_recipe_requests_thoughts_and_a_boxed_answer(tokenizer):
    own = tokenizer_with(tokenizer, NAMED["chatml"])
    text, _ = rendered(QA, "longCOT_qwen2.5", own)
    assert "<|begin_of_thought|>" in text.split("<|im_end|>")[0]
    assert "<|im_start|>user\nReturn your final response within \\boxed{}. q?<|im_end|>" in text
    assert texts(QA, "longCOT_qwen2.5", own, default_system="think")[0][0].startswith("<|im_start|>system\nthink<")


def test_a_default_system_message_is_for_conversations_without_one(tokenizer):
    assert texts(QA, "base", tokenizer, default_system="be brief")[0][0] == f"be brief\nq?\nyes{END}"
    assert texts(LONG, "base", tokenizer, default_system="be brief") == texts(LONG, "base", tokenizer)


def test_a_prompt_file_takes_the_first_question_in(tmp_path, tokenizer):
    path = tmp_path / "prompt.txt"
    path.write_text("Use \\boxed{{}}: {} Think.")
    (one,) = texts(LONG, "base", tokenizer, prompt_file=str(path))
    assert one == (f"sys\nUse \\boxed{{}}: q? Think.\nyes{END}more\nno{END}", [f"yes{END}", f"no{END}"])
    for text, words in (
        ("no place", "0 times"),
        ("{} {}", "2 times"),
        ("{name}", r"has \{name\}"),
        ("{", "exactly once"),
    ):
        path.write_text(text)
        with pytest.raises(LimbeckError, match=words):
            texts(QA, "base", tokenizer, prompt_file=str(path))


def test_plain_text_is_supervised_from_bos_to_eos(tokenizer, native_tokenizer):
    text = Conversation([{"role": "user", "content": "Once."}], plain=True)
    assert texts(text, None, native_tokenizer) == [(f"<s>Once.{END}", [f"<s>Once.{END}"])]
    assert texts(text, "chatml", tokenizer) == [(f"Once.{END}", [f"Once.{END}"])]


def test_a_row_without_supervised_answers_is_still_a_text(tokenizer):
    silent = [QA[0], {**QA[1], "weight": 0}]
    assert texts(silent, "chatml", tokenizer)[0][1] == []
    hides = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    assert rendered(silent, hides, tokenizer) == ("q?", [])
    with pytest.raises(LimbeckError, match="start of the answer is unknown"):
        rendered(QA, hides, tokenizer)


def test_marks_of_generation_in_a_template_change_nothing(tokenizer):
    marked = NAMED["chatml"].replace("{{ '<|im_start|>' +", "{% generation %}{{ '<|im_start|>' +", 1)
    marked = marked.replace("}}{% endfor", "}}{% endgeneration %}{% endfor", 1)
    assert "{% generation %}" in marked
    assert rendered(LONG, marked, tokenizer) == rendered(LONG, "chatml", tokenizer)


def test_a_template_sees_nothing_but_plain_values(tokenizer):
    class Door:
        def open(self):
            return "opened"

        def __str__(self):
            return "a door"

    jinja = (
        "{% for m in messages %}{{ m.content }}{{ m.door.open() if m.door and m.door.open else m.door }};{% endfor %}"
    )
    assert rendered([{**QA[0], "door": Door()}, QA[1]], jinja, tokenizer)[0].startswith("q?a door;")


def test_a_conversation_without_answer_is_a_prompt(tokenizer):
    assert rendered(QA[:1], "chatml", tokenizer) == ("<|im_start|>user\nq?<|im_end|>\n<|im_start|>assistant\n", [])


def test_weights_of_row_and_turn_multiply(tokenizer):
    def weights(conversation, **options):
        (one,) = render(conversation, resolve_template("base", tokenizer, **options), tokenizer, {}, "f.jsonl:1")
        return [weight for _, _, weight in one.spans], one.weight

    half, silent = {**LONG[2], "weight": 0.5}, {**LONG[4], "weight": 0}
    assert weights(Conversation(LONG)) == ([1, 1], 1)
    assert weights(Conversation([*LONG[:2], half, *LONG[3:]], weight=3)) == ([1.5, 3], 3)
    assert weights(Conversation([*LONG[:4], silent], weight=3)) == ([3, 0], 3)
    assert weights(Conversation(LONG), train_on="last") == ([1], 1)


TALK = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4)


@pytest.mark.parametrize("template", ["native", *NAMED])
def test_texts_equal_apply_chat_template_and_hold_each_answer_once(native_tokenizer, template):
    """The last text of a row is what transformers writes, and every answer is learned behind the prompt that it would get."""
    resolved = resolve_template(template, native_tokenizer)

    @given(TALK, st.none() | WORDS, st.booleans())
    @settings(max_examples=40, deadline=None)
    def check(talk, system, thinking):
        messages = [] if system is None else [{"role": "system", "content": system}]
        for question, answer in talk:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

        def theirs(turns, prompt):
            return native_tokenizer.apply_chat_template(
                turns,
                tokenize=False,
                chat_template=resolved.jinja,
                add_generation_prompt=prompt,
                enable_thinking=thinking,
            )

        out = render(Conversation(messages), resolved, native_tokenizer, {"enable_thinking": thinking}, "f.jsonl:1")
        assert out[-1].text.removesuffix(END).rstrip() == theirs(messages, False).rstrip().removesuffix(END).rstrip()
        learned = [(one.text[:start], one.text[start:end]) for one in out for start, end, _ in one.spans]
        turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        assert [prompt for prompt, _ in learned] == [theirs(messages[:turn], True) for turn in turns]
        for turn, (prompt, answer) in zip(turns, learned, strict=True):
            assert (prompt + answer).startswith(theirs(messages[: turn + 1], False).rstrip())

    check()


@pytest.mark.parametrize(
    "jinja",
    [
        "{{ raise_exception('no system') }}",
        "{% for %}",
        "{{ messages[9]['content'] + 'x' }}",
        "{{ 'a' + 1 }}",
        "{{ 'a'.index('b') }}",
    ],
)
def test_a_failing_template_names_the_row(tokenizer, jinja):
    with pytest.raises(LimbeckError, match=r"f\.jsonl:1: the chat template \(written in the configuration\)"):
        rendered(QA, jinja, tokenizer)


def test_templates_are_rendered_in_a_sandbox(tokenizer):
    with pytest.raises(LimbeckError, match="unsafe"):
        rendered(QA, "{{ messages.__class__.__mro__ }}", tokenizer)


def test_unknown_templates_are_reported_with_the_known_ones(tokenizer, build_tokenizer):
    with pytest.raises(LimbeckError, match="vicuna is unknown; use native, base, chatml, empty"):
        resolve_template("vicuna", tokenizer)
    with pytest.raises(LimbeckError, match="set template: base or template: chatml"):
        resolve_template("native", tokenizer)
    with pytest.raises(LimbeckError, match="ambiguous"):
        resolve_template("native", build_tokenizer(chat_template={"a": "x", "b": "y"}))
