"""One text in the tokens of two real tokenizers: spans hold the same bytes, are as short as can be, and nothing is lost."""

import json

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from limbeck.data import BatchStream, StreamSettings, Translator, fixed_batches, tokenize_rows
from limbeck.data.alignment import UNKNOWN, TokenText, common_spans, ends_from_offsets
from limbeck.data.batch import IGNORE, Batch
from limbeck.errors import LimbeckError

CORPUS = [
    "What is two and three? Two and three is five, indeed it is five.",
    "今天天气很好,我们去公园散步吧。今天我们学习数学。",
    "Das süße Mädchen fragt: wie viel ist 7 mal 8? 🙂 Es sind 56 🙂👍🏽.",
    "def add(a, b):\n    return a + b\n\n\tprint(add(1, 2))\n",
]
TEXTS = [
    "Two and three is five.",
    "今天我们去公园 🙂👍🏽 ok",
    "e\u0301a\u0308 combining, ﬁ ligature, \u200dzero width",
    "  two blanks,\ttab\n\nlines   ",
    "龘鿿 rare 𝔘𝔫𝔦 👩‍👩‍👧‍👦",
    "",
    " ",
]


def byte_level(
    vocab_size, *, corpus=CORPUS, special=("<pad>", "<|end|>"), eos="<|end|>", bos=None, prefix=False, normal=None
):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    if normal is not None:
        backend.normalizer = normal
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": list(special), "initial_alphabet": alphabet, "show_progress": False}
    backend.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=vocab_size, **options))
    if bos is not None:
        place = (bos, list(special).index(bos))
        backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[place])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, bos_token=bos, pad_token=special[0])


def sentencepiece(vocab_size):
    """As Llama 2's: ▁ for a blank, one put before every text, bytes for what has no token, <s> before all."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False, limit_alphabet=60,
    )  # fmt: skip
    backend.train_from_iterator(CORPUS, trainer)
    vocabulary = backend.get_vocab()
    merged = json.loads(backend.to_str())
    merged["added_tokens"] = [token for token in merged["added_tokens"] if token["content"] in special]
    backend = Tokenizer.from_str(json.dumps(merged))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


@pytest.fixture(scope="module")
def small():
    return byte_level(300)


@pytest.fixture(scope="module")
def large():
    """Another size, corpus, beginning and end."""
    return byte_level(600, corpus=CORPUS[::-1] * 2, special=("<pad>", "<s>", "</s>"), eos="</s>", bos="<s>")


@pytest.fixture(scope="module")
def pieces():
    return sentencepiece(480)


def batch_of(tokenizer, *texts, learn_from=0, end=True, position_ids=None):
    """Rows of text, each with its end token; everything from token ``learn_from`` on is learned."""
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * end for text in texts]
    width = max(map(len, rows)) + 2
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), IGNORE)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        first = max(learn_from, 1)
        labels[i, first - 1 : len(row) - 1] = torch.tensor(row[first:])
    return Batch.of(ids, labels, position_ids, sum(map(len, rows)))


def aligned_text(tokens, owner, text):
    """The bytes of the tokens of each span."""
    spans = {}
    for token, number in zip(tokens, owner, strict=True):
        spans.setdefault(number, []).append(token)
    return {number: b"".join(text.bytes[token] for token in tokens) for number, tokens in spans.items() if number >= 0}


def owners(first, rest, rest_span, count):
    owner = np.full(len(first) + len(rest), -1)
    owner[first.numpy()] = np.arange(count)
    owner[rest.numpy()] = np.where(rest_span.numpy() == count, -1, rest_span.numpy())
    return owner


def sides(translator, batch):
    """The translated view and both sides' tokens with the span of each."""
    view = translator.translate(batch).teacher_tokens
    spans = view.spans
    mine = owners(spans.student_first, spans.student_rest, spans.student_rest_span, len(spans))
    theirs = owners(spans.teacher_first, spans.teacher_rest, spans.teacher_rest_span, len(spans))
    return view, batch.labels.flatten()[batch.supervised].tolist(), mine, view.labels.tolist(), theirs


@settings(max_examples=120, deadline=None)
@given(
    text=st.text(max_size=40) | st.sampled_from(TEXTS), which=st.sampled_from(["small-large", "large-small", "pieces"])
)
@example(text=TEXTS[1], which="small-large")
@example(text=TEXTS[2], which="pieces")
@example(text=TEXTS[4], which="pieces")
def test_spans_hold_the_same_bytes_and_are_as_short_as_can_be(small, large, pieces, text, which):
    student, teacher = {"small-large": (small, large), "large-small": (large, small), "pieces": (small, pieces)}[which]
    if any(token in text for token in ("<pad>", "<s>", "</s>", "<unk>", "<|end|>")):
        return
    translator = Translator(student, teacher)
    batch = batch_of(student, "x" + text, learn_from=1)
    view, mine, my_span, theirs, their_span = sides(translator, batch)
    # Only a teacher with a BOS predicts the very first token, and no student without one does.
    ours, yours = aligned_text(mine, my_span, translator.student), aligned_text(theirs, their_span, translator.teacher)
    end = len(view.spans) - 1
    assert mine[-1] == student.eos_token_id and my_span[-1] == end
    assert theirs[-1] == teacher.eos_token_id and their_span[-1] == end
    assert (
        (my_span == end).sum() == (their_span == end).sum() == 1
    )  # the ends face each other, whatever they are called
    del ours[end], yours[end]
    assert ours == yours
    lossless = b"".join(translator.teacher.pieces(teacher("x" + text, add_special_tokens=False)["input_ids"]))
    assert lossless == ("x" + text).encode()
    # No shorter: no cut of both sides inside a span is at the same byte.
    for number in ours:
        cuts = [
            {*np.cumsum([len(p) for p in [text_of.bytes[token] for token in tokens]])[:-1]}
            for text_of, tokens in (
                (translator.student, [t for t, n in zip(mine, my_span, strict=True) if n == number]),
                (translator.teacher, [t for t, n in zip(theirs, their_span, strict=True) if n == number]),
            )
        ]
        assert not cuts[0] & cuts[1] - {0}
    # All of the text but the first span, which holds the token that nobody predicts.
    covered = b"".join(ours[n] for n in sorted(ours))
    assert ("x" + text).encode().endswith(covered)
    assert len(covered) >= len(("x" + text).encode()) - _first_span(student, teacher, translator, "x" + text)


def _first_span(student, teacher, translator, text):
    ends = [
        np.cumsum([len(p) for p in side.pieces(tokenizer(text, add_special_tokens=False)["input_ids"])])
        for side, tokenizer in ((translator.student, student), (translator.teacher, teacher))
    ]
    return min({*ends[0]} & {*ends[1]} - {0})


def test_every_token_of_a_byte_level_tokenizer_has_its_bytes(small):
    text = TokenText(small)
    assert sorted(piece for piece in text.bytes if piece is not None and len(piece) == 1) == [
        bytes([b]) for b in range(256)
    ]
    for sample in TEXTS:
        assert b"".join(text.pieces(small(sample)["input_ids"])) == sample.encode()


def test_an_invented_blank_is_no_text(small, pieces):
    prefixed = byte_level(300, prefix=True)
    for tokenizer in (prefixed, pieces):
        for sample in ("Two and", " Two", "今天"):
            ids = tokenizer(sample, add_special_tokens=False)["input_ids"]
            assert b"".join(TokenText(tokenizer).pieces(ids)).lstrip() == sample.encode().lstrip()
    ids = pieces("and</s>and", add_special_tokens=False)["input_ids"]
    assert b"".join(TokenText(pieces).pieces(ids)) == b"and</s>and"


def test_a_bos_token_of_one_tokenizer_does_not_change_the_alignment(small, large):
    bare = byte_level(600, corpus=CORPUS[::-1] * 2, special=("<pad>", "<s>", "</s>"), eos="</s>")
    batch = batch_of(small, "What is two and three?", "今天我们", learn_from=3)
    with_bos, without = (Translator(small, teacher).translate(batch).teacher_tokens for teacher in (large, bare))
    assert (with_bos.input_ids[:, 0] == large.bos_token_id).all()
    assert torch.equal(with_bos.input_ids[:, 1:], without.input_ids)
    assert torch.equal(with_bos.labels, without.labels)
    for name in ("student_first", "student_rest", "teacher_first", "teacher_rest", "teacher_rest_span"):
        assert torch.equal(getattr(with_bos.spans, name), getattr(without.spans, name))
    # And the student's own beginning is not read to a teacher as text.
    begun = Batch.of(*(torch.cat([torch.full((2, 1), fill), part], 1) for fill, part in (
        (1, batch.input_ids), (IGNORE, batch.labels))), None, 0)  # fmt: skip
    student = byte_level(300, special=("<pad>", "<|end|>", "<b>"), bos="<b>")
    begun.input_ids[:, 0] = student.bos_token_id
    again = Translator(student, large).translate(batch_of_ids(student, begun)).teacher_tokens
    assert b"<b>" not in b"".join(TokenText(large).pieces(again.input_ids[0].tolist()))
    assert (again.input_ids[:, 0] == large.bos_token_id).all()


def batch_of_ids(tokenizer, batch):
    """The same words in a tokenizer whose ids may differ."""
    return batch_of(
        tokenizer, *(tokenizer.bos_token + text for text in ("What is two and three?", "今天我们")), learn_from=3
    )


def test_questions_follow_the_labels_on_both_sides(small, large):
    """Each position's next token, in the teacher's row too."""
    batch = batch_of(small, "Two and three is five.", "公园散步", learn_from=2)
    view = Translator(small, large).translate(batch).teacher_tokens
    following = view.input_ids.flatten()[(view.supervised + 1).clamp_max(view.input_ids.numel() - 1)]
    inside = (view.supervised + 1) % view.input_ids.shape[1] != 0
    inside &= view.labels != large.eos_token_id  # the last answer need not be read
    assert torch.equal(following[inside], view.labels[inside])
    assert view.aligned_tokens == len(view.spans.student_first) + int(
        (view.spans.student_rest_span < len(view.spans)).sum()
    )


def test_a_span_that_reaches_into_the_prompt_is_not_compared(small, large):
    """The teacher writes " Mädchen" at once; if the answer begins within it, only the cross-entropy is left."""
    text = "is Mädchen"
    batch = batch_of(small, text, learn_from=len(small(text)["input_ids"]) - 1)
    translator = Translator(small, large)
    _, mine, my_span, theirs, _ = sides(translator, batch)
    answer = [translator.student.bytes[token] for token in mine[:-1]]
    whole = translator.teacher.pieces(large(text, add_special_tokens=False)["input_ids"])[-1]
    assert len(b"".join(answer)) < len(whole)
    assert my_span.tolist() == [-1] * len(answer) + [0]
    assert theirs == [large.eos_token_id]


def test_a_row_that_is_cut_within_a_character_is_compared_up_to_there(small, large):
    ids = small("five 🙂")["input_ids"]
    assert b"".join(TokenText(small).pieces(ids[:-1])) != "five 🙂".encode()
    batch = batch_of(small, "x")
    row = torch.tensor([ids[:-1]])
    batch = Batch.of(row, torch.cat([row[:, 1:], torch.tensor([[IGNORE]])], 1), None, row.numel())
    view = Translator(small, large).translate(batch).teacher_tokens
    assert TokenText(large).pieces(view.input_ids[0].tolist())[0] == b"<s>"
    assert view.aligned_tokens >= 1
    assert b"".join(TokenText(large).bytes[token] for token in view.labels.tolist()).strip() in b"five "


@pytest.mark.parametrize(
    "normal",
    [
        normalizers.NFKC(),
        normalizers.Lowercase(),
        normalizers.Strip(),
        normalizers.Replace("  ", " "),
        normalizers.NFD(),
    ],
    ids=lambda n: type(n).__name__,
)
@pytest.mark.parametrize("text", TEXTS[:5])
def test_a_teacher_that_normalises_is_aligned_by_its_offsets(small, normal, text):
    teacher = byte_level(500, normal=normal)
    translator = Translator(small, teacher)
    text = "x " + text + "  y Ünd ﬁne"
    view, mine, my_span, theirs, their_span = sides(translator, batch_of(small, text))
    ours, yours = aligned_text(mine, my_span, translator.student), aligned_text(theirs, their_span, translator.teacher)
    assert view.aligned_tokens > 0.5 * len(mine)
    # Between letters, because a normaliser may look at the ends of a text.
    plain = lambda piece: normal.normalize_str(f"x{piece.decode(errors='ignore')}x")[1:-1].replace(" ", "")  # noqa: E731
    for number, piece in list(ours.items())[:-1]:
        if piece.decode(errors="ignore").encode() == piece:  # whole characters
            assert plain(piece) == yours[number].decode().replace(" ", "")


def test_unknown_tokens_of_the_teacher_are_not_compared(small):
    """A teacher without single bytes says <unk> for a character: its probability is not that of the text."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(CORPUS[:1], trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>", "</s>"]))
    teacher = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    translator = Translator(small, teacher)
    _, mine, my_span, theirs, _ = sides(translator, batch_of(small, "two 好 and five"))
    assert teacher.unk_token_id not in theirs
    lost = b"".join(translator.student.bytes[t] for t, n in zip(mine, my_span, strict=True) if n < 0)
    assert "好".encode() in lost and b"five" not in lost


def test_special_tokens_can_be_translated(small):
    student = byte_level(300, special=("<pad>", "<|end|>", "<|start|>"))
    teacher = byte_level(500, special=("<pad>", "</s>", "<turn>"), eos="</s>")
    texts = [
        TokenText(teacher).pieces(
            Translator(student, teacher, tokens=tokens)
            .translate(batch_of(student, "<|start|>user\nTwo<|end|><|start|>bot\nfive"))
            .teacher_tokens.input_ids[0].tolist()
        )
        for tokens in ({}, {"<|start|>": "<turn>"})
    ]  # fmt: skip
    assert b"".join(texts[0]) == b"<|start|>user\nTwo</s><|start|>bot\nfive"
    assert b"".join(texts[1]) == b"<turn>user\nTwo</s><turn>bot\nfive"
    assert b"<turn>" in texts[1] and b"<|start|>" not in texts[0]
    for tokens, message in (
        ({"<start>": "<turn>"}, "'<start>' is not a special token of the student's"),
        ({"<|start|>": "turn"}, "'turn' is not a special token of the teacher's"),
    ):
        with pytest.raises(LimbeckError, match=message):
            Translator(student, teacher, tokens=tokens)


def test_packed_documents_are_packed_for_the_teacher_too(small, large):
    rows = [{"question": "What is two and three?", "answer": "five " + "indeed " * i} for i in range(8)]
    examples, _ = tokenize_rows(rows, small, template="base", sequence_length=96)
    options = {
        "seed": 1, "sequence_length": 96, "accumulation_steps": 1,
        "max_tokens_per_microbatch": 0, "length_round": 4, "pad_id": 0,
    }  # fmt: skip
    packed = next(
        BatchStream(examples, StreamSettings(packing=True, per_device_batch_size=2, **options))
    ).micro_batches[0]
    translator = Translator(small, large)
    view = translator.translate(packed).teacher_tokens
    documents = int((packed.position_ids == 0).sum())
    assert documents > packed.input_ids.shape[0]
    assert view.input_ids.shape == (1, sum(view.documents)) and len(view.documents) == documents
    assert view.position_ids[0].tolist() == [at for length in view.documents for at in range(length)]
    assert view.aligned_tokens == len(packed.supervised)
    alone = [
        translator.translate(batch).teacher_tokens
        for whole in fixed_batches(examples, batch_size=1, rank=0, world_size=1, pad_id=0, length_round=4)
        for batch in whole.micro_batches
    ]
    answers = sorted(tuple(one.labels.tolist()) for one in alone)
    ends = (view.labels == large.eos_token_id).nonzero().flatten().tolist()
    parts = [view.labels[a + 1 : b + 1].tolist() for a, b in zip([-1, *ends[:-1]], ends, strict=True)]
    assert all(tuple(part) in answers for part in parts)


def test_a_batch_without_supervised_tokens_still_has_a_teacher_row(small, large):
    empty = Batch.of(torch.zeros(1, 4, dtype=torch.int64), torch.full((1, 4), IGNORE), None, 0)
    view = Translator(small, large).translate(empty).teacher_tokens
    assert view.input_ids.shape == (1, 1)
    assert len(view.spans) == view.aligned_tokens == view.supervised.numel() == 0


def test_a_spans_weight_is_its_tokens(small, large):
    batch = batch_of(small, "Two and three", learn_from=2)
    weights = torch.where(batch.labels != IGNORE, 0.25, 0.0)
    weighted = Batch.of(batch.input_ids, batch.labels, None, 9, weights)
    view = Translator(small, large).translate(weighted).teacher_tokens
    assert torch.equal(view.spans.weight, torch.full((len(view.spans),), 0.25))
    assert view.total_weight == 0.25 * len(view.spans)


def test_equal_bytes_are_one_token_across_conventions(small, pieces):
    vocabularies = Translator(small, pieces).vocabularies(len(small), len(pieces))
    ours, theirs = TokenText(small).bytes, TokenText(pieces).bytes
    pairs = list(zip(vocabularies.student_common.tolist(), vocabularies.teacher_common.tolist(), strict=True))
    assert (small.eos_token_id, pieces.eos_token_id) in pairs
    assert all(ours[a] == theirs[b] for a, b in pairs if a != small.eos_token_id)
    assert len(pairs) >= 257  # every byte, at least
    names = {small.convert_ids_to_tokens(a): pieces.convert_ids_to_tokens(b) for a, b in pairs}
    assert names["Ġ"] == "▁" and names["a"] == "a" and names["Ċ"] in ("\n", "<0x0A>")
    assert any(a.startswith("Ġ") and b.startswith("▁") and len(a) > 1 for a, b in names.items())
    for side, common, rest in (
        (ours, vocabularies.student_common, vocabularies.student_rest),
        (theirs, vocabularies.teacher_common, vocabularies.teacher_rest),
    ):
        assert not {*common.tolist()} & {*rest.tolist()}
        assert len({*common.tolist()}) == len(common)
        assert len(common) + len(rest) <= len(side)
    assert not {small.pad_token_id} & {*vocabularies.student_rest.tolist()}  # special tokens are no words


def test_equal_tokenizers_pair_every_token_with_itself(pieces, large):
    for tokenizer in (pieces, large):
        vocabularies = Translator(tokenizer, tokenizer).vocabularies(len(tokenizer), len(tokenizer))
        assert torch.equal(vocabularies.student_common, torch.arange(len(tokenizer)))
        assert torch.equal(vocabularies.teacher_common, torch.arange(len(tokenizer)))
        assert not len(vocabularies.student_rest) and not len(vocabularies.teacher_rest)


def test_unsupported_tokenizers_raise_errors(small, large):
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "two": 1, "##s": 2, "</s>": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    odd = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="</s>", pad_token="</s>")
    with pytest.raises(LimbeckError, match="are neither bytes nor write blanks as ▁"):
        Translator(odd, small)
    with pytest.raises(LimbeckError, match=r"gives token id \d+, but the teacher has only 300 tokens"):
        Translator(small, large, teacher_size=300).translate(batch_of(small, "".join(CORPUS)))


@given(
    student=st.lists(st.integers(0, 3), max_size=12),
    teacher=st.lists(st.integers(0, 3), max_size=12),
    lost=st.sets(st.integers(0, 11)),
)
def test_common_spans_cut_wherever_both_do(student, teacher, lost):
    a, b = np.cumsum(student, dtype=np.int64), np.cumsum(teacher, dtype=np.int64)
    b = np.where(np.isin(np.arange(len(b)), list(lost)), UNKNOWN, b)
    mine, theirs = common_spans(a, b)
    assert [a[stop - 1] for _, stop in mine] == [b[stop - 1] for _, stop in theirs] == sorted({*a} & {*b} - {UNKNOWN})
    for spans in (mine, theirs):
        assert (spans[1:, 0] == spans[:-1, 1]).all() and (spans[:, 0] < spans[:, 1]).all()
        assert not len(spans) or spans[0, 0] == 0


def test_parts_of_a_character_end_at_no_boundary_but_the_last():
    assert ends_from_offsets("aé🙂b", [(0, 1), (1, 2), (1, 2), (2, 3), (2, 4), (3, 4)]).tolist() == [
        1,
        -1,
        3,
        -1,
        -1,
        8,
    ]
    assert ends_from_offsets("ab", [(0, 0), (0, 1), (1, 1), (1, 2)]).tolist() == [0, 1, 1, 2]
    assert ends_from_offsets("e\u0301a b", [(0, 1), (2, 3), (4, 5)]).tolist() == [-1, 4, 6]
    assert ends_from_offsets("", []).tolist() == []
