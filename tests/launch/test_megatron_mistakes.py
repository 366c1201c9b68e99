"""Mistakes in Megatron-LM's command line, its files and its checkpoints are one sentence each, before anything is trained."""

import os
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import make_corpus, make_model

from limbeck.errors import USER_MISTAKE
from limbeck.launch.start import train_from_arguments
from limbeck.models import ModelSource, load_model
from limbeck.models.megatron_checkpoint import write_checkpoint

MODEL = """--num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --position-embedding-type rope
    --normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
    --max-position-embeddings 64"""
RUN = """--seq-length 16 --micro-batch-size 2 --train-iters 2 --lr 1e-3 --eval-iters 0 --log-interval 1 --save out
    --attention-dropout 0 --hidden-dropout 0"""
TOKENIZER = "--tokenizer-type HuggingFaceTokenizer --tokenizer-model teacher"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The working folder, with a teacher of Hugging Face and a student of Megatron-LM."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("CUDA")]:
        monkeypatch.delenv(name)
    make_model(tmp_path / "teacher", kind="llama")
    student = load_model(ModelSource(str(tmp_path / "teacher"), "student"), torch.float32)
    write_checkpoint(student, tmp_path / "mcore", 10)
    return tmp_path


def _empty_teacher(folder: Path) -> str:
    (folder / "empty").mkdir()
    return f"{MODEL} {TOKENIZER} --mock-data --export-kd-teacher-load empty"


def _teacher_without_config(folder: Path) -> str:
    (folder / "teacher" / "config.json").unlink()
    return f"{MODEL} {TOKENIZER} --mock-data --export-kd-teacher-load teacher"


def _unknown_nemo_key(folder: Path) -> str:
    (folder / "mcore" / "model_config.yaml").write_text("hidden_sise: 32")
    return f"{MODEL} {TOKENIZER} --mock-data --export-kd-teacher-load mcore"


def _other_sizes_in_the_nemo_file(folder: Path) -> str:
    (folder / "mcore" / "model_config.yaml").write_text("hidden_size: 64")
    return f"{MODEL} {TOKENIZER} --mock-data --export-kd-teacher-load mcore"


def _distillation(text: str):
    def change(folder: Path) -> str:
        (folder / "kd.yaml").write_text(text)
        return f"{MODEL} {TOKENIZER} --mock-data --export-kd-teacher-load teacher --export-kd-cfg kd.yaml"

    return change


def _flags(text: str):
    return lambda folder: f"{MODEL} {TOKENIZER} --mock-data --export-kd-teacher-load teacher {text}"


def _tokenizer_beyond_the_checkpoint(folder: Path) -> str:
    return "--load mcore --use-checkpoint-args --tokenizer-type NullTokenizer --vocab-size 1000 --mock-data"


def _other_tokenizer_than_the_teachers(folder: Path) -> str:
    return f"{MODEL} --tokenizer-type NullTokenizer --vocab-size 320 --mock-data --export-kd-teacher-load teacher"


def _corpus(folder: Path) -> str:
    make_corpus(folder / "corpus", [np.arange(2, 40) for _ in range(4)])
    return f"{MODEL} {TOKENIZER} --export-kd-teacher-load teacher --data-path corpus --split 1,0,0"


def _bin_that_is_too_short(folder: Path) -> str:
    flags = _corpus(folder)
    content = (folder / "corpus.bin").read_bytes()
    (folder / "corpus.bin").write_bytes(content[: len(content) // 2])
    return flags


def _index_of_something_else(folder: Path) -> str:
    flags = _corpus(folder)
    (folder / "corpus.idx").write_bytes(b"{}" * 30)
    return flags


def _index_that_is_too_long(folder: Path) -> str:
    flags = _corpus(folder)
    (folder / "corpus.idx").write_bytes((folder / "corpus.idx").read_bytes() + b"xx")
    return flags


class _Malicious:
    def __reduce__(self):
        return exec, ("raise SystemExit('it ran')",)


def _legacy(folder: Path) -> Path:
    path = folder / "legacy" / "iter_0000010" / "mp_rank_00" / "model_optim_rng.pt"
    path.parent.mkdir(parents=True)
    (folder / "legacy" / "latest_checkpointed_iteration.txt").write_text("10")
    torch.save({"args": Namespace(num_layers=2), "model": _Malicious()}, path)
    return folder / "legacy"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_empty_teacher, "--export-kd-teacher-load = empty has no checkpoint of Megatron-LM or Hugging Face, and no model_"),
        (_teacher_without_config, "--export-kd-teacher-load = teacher has no checkpoint of Megatron-LM or Hugging Face"),
        (_unknown_nemo_key, "hidden_sise in mcore/model_config.yaml is not a key of a teacher's model_config.yaml; did you"),
        (_other_sizes_in_the_nemo_file, "mcore/iter_0000010: "),
        (_distillation("logit_layers: [nothing, output_layer]"), "logit_layers"),
        (_distillation("intermediate_layer_pairs: [[decoder.layers.9.mlp, decoder.layers.0.mlp]]"), "decoder.layers.9.mlp"),
        (_distillation("intermediate_layer_pair: []"), "intermediate_layer_pair is not a key of ModelOpt"),
        (_flags("--tensor-model-parallel-size 3"), "tensor_model_parallel_size"),
        (_flags("--limbeck-strategy megatron"), "megatron"),
        (_tokenizer_beyond_the_checkpoint, "the tokenizer null:1000 has 1000 tokens, and the vocabulary of the model has"),
        (_other_tokenizer_than_the_teachers, "The tokenizers of student"),
        (_bin_that_is_too_short, "corpus.bin"),
        (_index_of_something_else, "corpus.idx"),
        (_index_that_is_too_long, "corpus.idx has 2 bytes after what its 8 sequences need"),
        (lambda folder: f"--load {_legacy(folder)} --use-checkpoint-args {TOKENIZER} --mock-data", "would have to be unpick"),
        (lambda folder: _flags("")(folder).replace("load teacher", f"load {_legacy(folder)}"), "would have to be unpickled"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_before_anything_is_trained(folder, capfd, change, sentence):
    words = f"{change(folder)} {RUN}".split()
    assert train_from_arguments("examples/pretrain_gpt.py", words, "megatron") == USER_MISTAKE
    (line,) = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("note: ")]
    assert line.startswith("limbeck: ") and sentence in line and line.endswith((".", "?")), line
    assert not list(folder.glob("out/**/metrics.jsonl")) and not list(folder.glob("out/**/checkpoint-*"))


def test_without_a_mistake_the_same_command_trains(folder):
    assert train_from_arguments("examples/pretrain_gpt.py", f"{_corpus(folder)} {RUN}".split(), "megatron") == 0
    assert list(folder.glob("out/**/checkpoint-2"))


def test_a_run_whose_time_is_over_prints_the_flags_that_go_on_with_it(folder, capsys):
    words = f"{_corpus(folder)} {RUN} --exit-duration-in-mins 1"
    assert train_from_arguments("examples/pretrain_gpt.py", words.split(), "megatron") == 0
    assert "(--exit-duration-in-mins) = 00:01 after step 1; --load out goes on from there." in capsys.readouterr().out
    assert train_from_arguments("examples/pretrain_gpt.py", words.split(), "megatron") == USER_MISTAKE
    assert "--save = out has checkpoints of an earlier run; give --load out" in capsys.readouterr().err
