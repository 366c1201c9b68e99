import json

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from limbeck.data import check_same_tokenizer
from limbeck.errors import LimbeckError
from limbeck.models import ModelSource, load_tokenizer


def test_equal_content_under_another_name_passes(build_tokenizer):
    check_same_tokenizer(build_tokenizer(name_or_path="a"), build_tokenizer(name_or_path="b", pad_token="<s>"))


def test_another_choice_of_eos_among_the_same_ids_passes(build_tokenizer):
    check_same_tokenizer(build_tokenizer(), build_tokenizer(eos_token="<|im_end|>"))


def test_swapped_special_tokens_are_reported_with_examples(build_tokenizer):
    student = build_tokenizer(name_or_path="small")
    teacher = build_tokenizer(name_or_path="large", special=["<s>", "<|endoftext|>", "<|im_end|>", "<|im_start|>"])
    with pytest.raises(LimbeckError) as caught:
        check_same_tokenizer(student, teacher)
    for words in (
        "small",
        "large",
        "differ in 2 of",
        "2 is '<|im_start|>' for the student, '<|im_end|>' for the teacher",
    ):
        assert words in str(caught.value)


def test_a_token_added_on_one_side_passes_and_a_longer_vocabulary_does_not(build_tokenizer):
    student, teacher = build_tokenizer(), build_tokenizer()
    teacher.add_tokens(["<tool>"])
    check_same_tokenizer(student, teacher)
    check_same_tokenizer(teacher, student)
    wider = json.loads(student.backend_tokenizer.to_str())
    wider["model"]["vocab"]["ab"] = len(student)
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(wider)))
    with pytest.raises(LimbeckError, match=r"differ in 1 of \d+ ids .* unused for the student, 'ab' for the teacher"):
        check_same_tokenizer(student, other)


def changed(tokenizer, change):
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    change(content)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content["model"]["merges"].reverse(), "merges"),
        (lambda content: content.update(normalizer={"type": "Lowercase"}), "normalizer"),
        (lambda content: content["pre_tokenizer"].update(add_prefix_space=True), "pre-tokenizer"),
    ],
)
def test_tokenizers_that_split_text_differently_are_refused(build_tokenizer, change, words):
    with pytest.raises(LimbeckError, match=rf"have the same ids, but split text differently \(their {words} differ\)"):
        check_same_tokenizer(build_tokenizer(), changed(build_tokenizer(), change))


def test_what_does_not_cut_text_may_differ(build_tokenizer):
    def change(content):
        content.update(post_processor=None, decoder=None)
        content["model"].update(dropout=None, fuse_unk=False)

    check_same_tokenizer(build_tokenizer(), changed(build_tokenizer(), change))


def test_the_two_files_of_gpt2_are_its_tokenizer(build_tokenizer, tmp_path):
    backend = build_tokenizer().backend_tokenizer
    vocab, merges = backend.model.save(str(tmp_path))
    tokenizer = load_tokenizer(ModelSource(f"gpt2:{vocab},{merges}", "student"))
    for text in ("What is 3 plus 4?", "  two spaces, ünïcode and\nlines"):
        assert tokenizer.encode(text) == backend.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(LimbeckError, match=r"vocab\.json has no token <\|endoftext\|>"):
        load_tokenizer(ModelSource(f"gpt2:{vocab},{merges}", "student"))
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(LimbeckError, match=r"must name a vocab\.json and a merges\.txt of GPT-2, which cannot be read"):
        load_tokenizer(ModelSource(f"gpt2:{vocab},{merges}", "student"))
