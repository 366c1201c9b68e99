"""Aligns the tokens of a student and a teacher with different tokenizers.

The teacher reads the bytes of the student's tokens, tokenised by its own tokenizer. Only special tokens are translated: EOS
to the teacher's EOS, BOS to the teacher's BOS or nothing, and others by a given table. Both token sequences then have
boundaries in the same text, and a *span* is the shortest part of the text at whose ends both have a boundary.

Only the student's ids are needed, so generated text is handled like text from a file.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from limbeck.data.batch import IGNORE, Batch, TeacherTokens, cumulative_lengths
from limbeck.errors import LimbeckError
from limbeck.objectives.spans import Spans, Vocabularies

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ints = NDArray[np.int64]

UNKNOWN = -1
"""The end of a token that is not a boundary of the text, or whose position is unknown."""

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}".encode()


def common_spans(student_ends: Ints, teacher_ends: Ints) -> tuple[Ints, Ints]:
    """Returns the shortest spans between common boundaries: tokens ``[first, stop)`` of the student and of the teacher, [S, 2].

    student_ends [n], teacher_ends [m]: end of each token in the common text, non-decreasing; ``UNKNOWN`` for a token that
    does not end at a boundary. An empty token belongs to the span after it. Tokens after the last common boundary are in no
    span.
    """
    boundaries, stops = [], []
    for ends in (student_ends, teacher_ends):
        known, first = np.unique(ends, return_index=True)
        boundaries.append(known[known != UNKNOWN])
        stops.append(first[known != UNKNOWN] + 1)
    _, mine, theirs = np.intersect1d(boundaries[0], boundaries[1], assume_unique=True, return_indices=True)
    return _between(stops[0][mine]), _between(stops[1][theirs])


def _between(stops: Ints) -> Ints:
    return np.stack([np.concatenate(([0], stops))[:-1], stops], -1).astype(np.int64)


def ends_from_offsets(text: str, offsets: Sequence[tuple[int, int]]) -> Ints:
    """Returns the end of each token in UTF-8 bytes of ``text``, from the characters ``[start, end)`` it covers [n, 2].

    Tokens that cover parts of one character overlap; only the last of them ends at a boundary. Text that no token covers was
    removed or merged by a normaliser, so there is no boundary before it, unless it is blank: some tokenizers exclude blanks
    from the offsets of the following token.
    """
    if not len(offsets):
        return np.empty(0, dtype=np.int64)
    covered = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    bytes_before = np.cumsum([0, *(len(character.encode()) for character in text)], dtype=np.int64)
    reached = np.maximum.accumulate(covered[:, 1])
    later = np.append(np.minimum.accumulate(covered[::-1, 0])[::-1][1:], len(text))
    gaps = [text[end:start].strip(" ") != "" for end, start in zip(reached.tolist(), later.tolist(), strict=True)]
    return np.where((later >= reached) & ~np.array(gaps), bytes_before[reached], UNKNOWN)


class TokenText:
    """The bytes of every token of a tokenizer.

    Supports byte-level tokenizers (GPT-2, Llama 3, Qwen) and tokenizers that write a blank as ▁ (Llama 2, Gemma, Mistral, T5),
    with or without byte fallback. ``known`` is False for any other.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.name = tokenizer.name_or_path or type(tokenizer).__name__
        if not tokenizer.is_fast:
            raise LimbeckError(
                f"The tokenizer {self.name} is not a fast one, so the text of its tokens is unknown; use a checkpoint "
                "that holds a tokenizer.json."
            )
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        parts = json.dumps([backend["normalizer"], backend["pre_tokenizer"], backend["decoder"]], ensure_ascii=False)
        self.byte_level = '"ByteLevel"' in parts
        self.known = self.byte_level or "▁" in parts
        self.added = dict(tokenizer.added_tokens_decoder)
        self.special = {index for index, token in self.added.items() if token.special}
        self.special |= {tokenizer.eos_token_id, tokenizer.bos_token_id} - {None}
        self.unknown = tokenizer.unk_token_id
        vocabulary = tokenizer.get_vocab()
        self.bytes: list[bytes | None] = [None] * (max(vocabulary.values()) + 1)
        self.fallback: set[int] = set()  # byte-fallback tokens
        for token, index in vocabulary.items():
            self.bytes[index] = self._bytes_of(token, index)
        self._blank_at_start = self._adds_a_blank("")
        self._blank_after_token = tokenizer.eos_token is not None and self._adds_a_blank(tokenizer.eos_token)

    def _bytes_of(self, token: str, index: int) -> bytes:
        if index == self.unknown and index not in (self.tokenizer.eos_token_id, self.tokenizer.bos_token_id):
            return _REPLACEMENT
        if index in self.added:
            return token.encode()
        if self.byte_level:
            try:
                return bytes(_BYTE_OF[character] for character in token)
            except KeyError:
                return token.encode()
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            self.fallback.add(index)
            return bytes([int(token[3:5], 16)])
        return token.replace("▁", " ").encode()

    def _adds_a_blank(self, before: str) -> bool:
        ids = self.tokenizer(before + "x", add_special_tokens=False)["input_ids"]
        return b"".join(self.bytes[index] or b"" for index in ids).removeprefix(before.encode()).startswith(b" ")

    def pieces(self, ids: Sequence[int]) -> list[bytes]:
        """Returns the bytes of each token of a sequence, without a blank that the tokenizer adds before a text."""
        pieces, fresh = [], self._blank_at_start
        for index in ids:
            piece = (self.bytes[index] if index < len(self.bytes) else None) or b""
            if index in self.added:
                fresh = self._blank_after_token
            else:
                piece, fresh = (piece[1:] if fresh and piece.startswith(b" ") else piece), False
            pieces.append(piece)
        return pieces


def _byte_characters() -> dict[str, int]:
    """GPT-2's byte alphabet: a printable byte is its own character, any other a character above 255."""
    shown = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_BYTE_OF = _byte_characters()


@dataclass(frozen=True)
class _Reading:
    """A document as text for the teacher, and positions in the common text.

    positions: [bytes + 1] position of the end of every byte. student_ends: [tokens] position of the end of every student token.
    """

    text: str
    positions: Ints
    student_ends: Ints


class Translator:
    """Adds the teacher's tokens to a batch of the student."""

    def __init__(
        self,
        student: PreTrainedTokenizerBase,
        teacher: PreTrainedTokenizerBase,
        *,
        tokens: Mapping[str, str] | None = None,
        teacher_length: int | None = None,
        teacher_size: int | None = None,
    ) -> None:
        """
        tokens:         special tokens of the student -> tokens of the teacher; EOS is always included.
        teacher_length: maximum number of tokens that the teacher reads; later tokens are in no span.
        teacher_size:   vocabulary size of the teacher.

        Raises LimbeckError for an unsupported student tokenizer, and for names in ``tokens`` that are not special tokens.
        """
        self.student, self.teacher = TokenText(student), TokenText(teacher)
        if not self.student.known:
            raise LimbeckError(
                f"cross_tokenizer: the tokens of {self.student.name} are neither bytes nor write blanks as ▁, so their "
                "text is unknown; use a student with a byte-level or SentencePiece tokenizer."
            )
        self.teacher_length, self.teacher_size = teacher_length, teacher_size
        self._twins = {student.eos_token_id: teacher.eos_token_id}
        for ours, theirs in (tokens or {}).items():
            self._twins[_id_of(student, ours, "student")] = _id_of(teacher, theirs, "teacher")
        self._begin = _bos(teacher)

    def vocabularies(self, student_size: int, teacher_size: int) -> Vocabularies:
        """Returns the pairs of equal tokens: same bytes, EOS, and those of the table. Raises LimbeckError if there are none."""
        pairs: dict[int, int] = {}
        for ours, theirs in self._twins.items():  # if several map to the same token, the first is paired with it
            if ours < student_size and theirs < teacher_size and theirs not in pairs.values():
                pairs[ours] = theirs
        taken = set(pairs.values())
        groups = [
            self._groups(self.student, student_size, pairs.keys()),
            self._groups(self.teacher, teacher_size, taken),
        ]
        for key, mine in groups[0].items():
            pairs.update(zip(mine, groups[1].get(key, ()), strict=False))
        taken = set(pairs.values())
        if len(pairs) <= len(self._twins):
            raise LimbeckError(
                f"the tokenizers {self.student.name} and {self.teacher.name} have no token in common; use another teacher."
            )
        rests = [
            sorted(i for (special, _), ids in group.items() if not special for i in ids if i not in matched)
            for group, matched in zip(groups, (pairs.keys(), taken), strict=True)
        ]
        common = sorted(pairs.items())
        tensors = [[ours for ours, _ in common], [theirs for _, theirs in common], *rests]
        return Vocabularies(student_size, teacher_size, *(torch.tensor(ids, dtype=torch.int64) for ids in tensors))

    @staticmethod
    def _groups(text: TokenText, size: int, without: Iterable[int]) -> dict[tuple[bool, bytes], list[int]]:
        """Groups ids by their bytes, byte-fallback tokens last."""
        without = set(without)
        groups = defaultdict(list)
        for index, piece in enumerate(text.bytes[:size]):
            if piece is not None and index not in without:
                groups[index in text.special or index == text.unknown, piece].append(index)
        for ids in groups.values():
            ids.sort(key=lambda index: (index in text.fallback, index))
        return groups

    def translate(self, batch: Batch) -> Batch:
        """Returns the batch with its ``teacher_tokens``. Every document is cut after its last span. Those of a packed batch
        are packed, and others become one row each.
        """
        if batch.teacher_batch is not None:  # the supervised positions correspond one to one
            read = self.translate(replace(batch.teacher_batch, weights=batch.weights))
            return replace(batch, teacher_tokens=read.teacher_tokens, teacher_batch=None)
        time = batch.labels.shape[1]
        labels = batch.labels.numpy()
        ids = batch.input_ids.numpy()
        documents = list(_documents(batch))
        readings = [self._read(ids[row, first:stop]) for row, first, stop in documents]
        tokenised = self._tokenize([reading.text for reading in readings])

        order = np.cumsum(labels.reshape(-1) != IGNORE) - 1
        student_span = np.full(len(batch.supervised), -1, dtype=np.int64)
        teacher_span: list[Ints] = []
        rows: list[Ints] = []
        positions: list[Ints] = []
        targets: list[Ints] = []
        count = 0
        for (row, first, stop), reading, (teacher_ids, teacher_ends) in zip(
            documents, readings, tokenised, strict=True
        ):
            ours = ids[row, first:stop]
            known = np.where(teacher_ends >= 0, reading.positions[teacher_ends], UNKNOWN)
            mine, theirs = common_spans(reading.student_ends, known)
            learned = np.concatenate(([False], labels[row, first : stop - 1] != IGNORE))
            if self.student.unknown is not None:
                learned &= (ours != self.student.unknown) | np.isin(ours, list(self._twins))
            # No position predicts the first token of a row.
            predicted = np.arange(len(teacher_ids)) > 0
            if self.teacher.unknown is not None:
                predicted &= (teacher_ids != self.teacher.unknown) | np.isin(teacher_ids, list(self._twins.values()))
            keep = _all_within(learned, mine) & _all_within(predicted, theirs)
            mine, theirs = mine[keep], theirs[keep]
            numbers = np.arange(count, count + len(mine))
            at = _members(mine) + row * time + first - 1
            student_span[order[at]] = np.repeat(numbers, mine[:, 1] - mine[:, 0])
            members = _members(theirs)
            rows.append(teacher_ids[: members[-1] if len(members) else 1])  # later tokens are not needed
            teacher_span.append(np.repeat(numbers, theirs[:, 1] - theirs[:, 0]))
            positions.append(members - 1)
            targets.append(teacher_ids[members])
            count += len(mine)

        lengths, packed = [len(tokens) for tokens in rows] or [1], batch.documents is not None
        starts = np.cumsum([0, *lengths[:-1]]) if packed else np.arange(len(lengths)) * max(lengths)
        input_ids = np.zeros((1, sum(lengths)) if packed else (len(lengths), max(lengths)), dtype=np.int64)
        for start, tokens, of_row in zip(starts, rows, positions, strict=False):
            input_ids.reshape(-1)[start : start + len(tokens)] = tokens
            of_row += start
        spans = Spans.of(student_span, _joined(teacher_span), _weights(batch, student_span, count))
        teacher_tokens = TeacherTokens(
            input_ids=torch.from_numpy(input_ids),
            supervised=torch.from_numpy(_joined(positions)),
            labels=torch.from_numpy(_joined(targets)),
            spans=spans,
            aligned_tokens=int((student_span >= 0).sum()),
            total_weight=float(spans.weight.sum()),
            position_ids=torch.cat([torch.arange(length) for length in lengths])[None] if packed else None,
            documents=tuple(lengths) if packed else None,
            cu_seqlens=cumulative_lengths(lengths) if packed else None,
        )
        return replace(batch, teacher_tokens=teacher_tokens)

    def _read(self, ids: Ints) -> _Reading:
        text, positions, ends, here = bytearray(), [0], [], 0
        student_bos = self.student.tokenizer.bos_token_id
        for i, (index, piece) in enumerate(zip(ids.tolist(), self.student.pieces(ids.tolist()), strict=True)):
            twin = self._twins.get(index)
            if i == 0 and index == student_bos:
                pass  # the teacher has its own BOS or none
            elif twin is not None:
                content = self.teacher.bytes[twin] or b""
                text += content
                here += 1
                positions += [UNKNOWN] * (len(content) - 1) + [here]
            else:
                text += piece
                positions += range(here + 1, here + len(piece) + 1)
                here += len(piece)
            ends.append(here)
        try:
            whole = text.decode()
        except UnicodeDecodeError as error:  # a row truncated inside a character, or generated bytes that are not UTF-8
            whole = text[: error.start].decode()
        return _Reading(whole, np.asarray(positions, dtype=np.int64), np.asarray(ends, dtype=np.int64))

    def _tokenize(self, texts: Sequence[str]) -> list[tuple[Ints, Ints]]:
        """Returns, for each text, the teacher's ids including BOS, and the end of each in bytes of the text."""
        if not texts:
            return []
        encoded = self.teacher.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            padding=False,
            truncation=False,
            verbose=False,
        )
        results = []
        for text, ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            pieces = self.teacher.pieces(ids)
            if b"".join(pieces) == text.encode():
                ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
            else:  # a normaliser has changed the text; the offsets still refer to the original
                ends = ends_from_offsets(text, offsets)
            if self.teacher_size is not None and max(ids, default=0) >= self.teacher_size:
                raise LimbeckError(
                    f"the teacher's tokenizer {self.teacher.name} gives token id {max(ids)}, but the teacher has only "
                    f"{self.teacher_size} tokens; use the tokenizer that it was trained with."
                )
            begin = [] if self._begin is None else [self._begin]
            whole = np.asarray([*begin, *ids], dtype=np.int64)[: self.teacher_length]
            results.append((whole, np.concatenate([np.zeros(len(begin), dtype=np.int64), ends])[: self.teacher_length]))
        return results


def _id_of(tokenizer: PreTrainedTokenizerBase, token: str, role: str) -> int:
    index = tokenizer.get_vocab().get(token)
    if index is None or index not in tokenizer.added_tokens_decoder:
        raise LimbeckError(
            f"cross_tokenizer_tokens: {token!r} is not a special token of the {role}'s tokenizer ({tokenizer.name_or_path}); "
            "give pairs of special tokens, the student's first."
        )
    return int(index)


def _bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """BOS, if the tokenizer adds it to a text."""
    begin = tokenizer.bos_token_id
    return begin if begin is not None and tokenizer("")["input_ids"][:1] == [begin] else None


def _documents(batch: Batch) -> Iterable[tuple[int, int, int]]:
    """Yields (row, first, stop) of every document with a supervised token, up to the last of these."""
    labels = batch.labels.numpy()
    for row in range(labels.shape[0]):
        begins = np.array([0])
        if batch.position_ids is not None:
            begins = np.union1d(begins, np.flatnonzero(batch.position_ids[row].numpy() == 0))
        for first, stop in zip(begins, [*begins[1:], labels.shape[1]], strict=True):
            supervised = np.flatnonzero(labels[row, first:stop] != IGNORE)
            if len(supervised):
                yield row, int(first), int(first + supervised[-1] + 2)


def _all_within(good: NDArray[np.bool_], spans: Ints) -> NDArray[np.bool_]:
    """Returns which spans [S, 2] contain only tokens that are ``good``."""
    before = np.concatenate(([0], np.cumsum(~good)))
    return before[spans[:, 1]] == before[spans[:, 0]]


def _members(spans: Ints) -> Ints:
    """Returns the tokens of all spans [S, 2], concatenated."""
    lengths = spans[:, 1] - spans[:, 0]
    skipped = spans[:, 0] - (np.cumsum(lengths) - lengths)
    return np.arange(lengths.sum(), dtype=np.int64) + np.repeat(skipped, lengths)


def _weights(batch: Batch, student_span: Ints, count: int) -> NDArray[np.float32]:
    """Returns the mean weight of each span's tokens, [count]."""
    if batch.weights is None:
        return np.ones(count, dtype=np.float32)
    inside = student_span >= 0
    sums = np.bincount(student_span[inside], weights=batch.weights.numpy()[inside], minlength=count)
    return (sums / np.bincount(student_span[inside], minlength=count)).astype(np.float32)


def _joined(parts: Sequence[Ints]) -> Ints:
    return np.concatenate([np.empty(0, dtype=np.int64), *parts])
