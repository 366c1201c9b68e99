"""Runs with a teacher that has another tokenizer."""

import json
from pathlib import Path

import pytest
import torch
from runs import assert_same_weights, forget_after, train
from tiny import TEMPLATE, make_model, rows
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import decoders as dec
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from limbeck import DistillPipeline, LimbeckError


def make_other_tokenizer(folder: Path) -> None:
    """Like SentencePiece: spaces as ▁, byte fallback, a beginning-of-sequence token, and other special tokens."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = dec.Sequence([dec.Replace("▁", " "), dec.ByteFallback(), dec.Fuse(), dec.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=460, special_tokens=special, show_progress=False)
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    backend.train_from_iterator([row["answer"] + " " + row["question"] for row in rows()], trainer)
    parts = json.loads(backend.to_str())
    parts["added_tokens"] = [token for token in parts["added_tokens"] if not token["content"].startswith("<0x")]
    backend = Tokenizer.from_str(json.dumps(parts))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def stranger(tmp_path_factory) -> Path:
    """A teacher with another tokenizer."""
    folder = tmp_path_factory.mktemp("stranger")
    # For a Qwen2 checkpoint, transformers would create a Qwen2 tokenizer regardless of the files.
    make_model(folder / "teacher", kind="mistral", hidden=48, layers=3, seed=1, vocab_size=340, eos_token_id=2)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / "teacher" / name).unlink()
    make_other_tokenizer(folder / "teacher")
    return folder / "teacher"


@pytest.fixture
def cross(stranger):
    return {"teacher_pretrain": str(stranger), "cross_tokenizer": "hybrid", "distill_loss_weight": 1.0}


def lines(folder: Path, key: str) -> list[float]:
    found = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in found if key in line]


@pytest.mark.parametrize("changes", [
    {"cross_tokenizer": "hybrid"},
    pytest.param({"cross_tokenizer": "hybrid", "student.use_sequence_packing": True, "kd_objective": "js_divergence"},
                 marks=pytest.mark.slow),
    pytest.param({"cross_tokenizer": "hybrid", "student.model_args.dtype": "bf16", "teacher.model_args.dtype": "bf16"},
                 marks=pytest.mark.slow),
    {"cross_tokenizer": "uld"},
], ids=["hybrid", "packed", "bf16", "uld"])  # fmt: skip
def test_distillation_from_a_teacher_with_another_tokenizer_reduces_the_divergence(configure, cross, changes):
    packed = "student.use_sequence_packing" in changes
    batch = {"student.training_args.per_device_train_batch_size": 2} if packed else {}
    config = configure(**{**cross, **changes, **batch, "max_steps": 40, "save_steps": 0, "eval_steps": 10,
                          "student.training_args.learning_rate": 3e-3})  # fmt: skip
    DistillPipeline(config).run()
    out = Path(config.output_dir)
    learned = lines(out, "train/train_distill_loss")
    assert sum(learned[-3:]) < 0.65 * sum(learned[:3])
    assert lines(out, "val/kd")[-1] < lines(out, "val/kd")[0]
    assert set(lines(out, "train/aligned_share")) == {1.0}
    tokenizer = AutoTokenizer.from_pretrained(out / "student")
    assert tokenizer.chat_template == TEMPLATE


@pytest.mark.slow
def test_resume_is_bit_exact(configure, cross, tmp_path):
    through = configure(**cross, output_dir=str(tmp_path / "through"))
    DistillPipeline(through).run()
    broken = {**cross, "output_dir": str(tmp_path / "broken")}
    DistillPipeline(configure(**broken)).run()
    forget_after(tmp_path / "broken", 5)
    DistillPipeline(configure(**broken, resume_from_checkpoint=True)).run()
    assert_same_weights(tmp_path / "through" / "student", tmp_path / "broken" / "student")


def test_any_split_into_micro_batches_gives_the_same_gradient(configure, cross, tmp_path):
    norms = []
    for name, rows_each, times in (("one", 8, 1), ("four", 2, 4)):
        config = configure(**{
            **cross, "output_dir": str(tmp_path / name), "distill_loss_weight": 0.5, "max_steps": 3,
            "student.training_args.per_device_train_batch_size": rows_each,
            "student.training_args.gradient_accumulation_steps": times,
        })  # fmt: skip
        DistillPipeline(config).run()
        norms.append([lines(tmp_path / name, key) for key in ("train/loss", "student/grad_norm", "val/loss")])
    for one, other in zip(*norms, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_with_equal_tokenizers_the_losses_are_those_of_an_ordinary_run(configure, tmp_path):
    for name, kind in (("off", "off"), ("hybrid", "hybrid")):
        DistillPipeline(configure(output_dir=str(tmp_path / name), cross_tokenizer=kind)).run()
    for key in ("train/loss", "train/train_distill_loss", "train/top1_agreement", "val/loss", "student/grad_norm"):
        assert lines(tmp_path / "hybrid", key) == pytest.approx(lines(tmp_path / "off", key), rel=2e-5), key
    assert set(lines(tmp_path / "hybrid", "train/aligned_share")) == {1.0}


def test_samples_of_one_origin_have_one_objective(configure, cross, tmp_path):
    changes = {**cross, "max_steps": 1, "eval_steps": 0, "sequence_length": 96, "rollout": {"max_new_tokens": 8}}
    for weight in (0.9, 1.0):  # what the student writes has no cross-entropy
        changes |= {"distill_loss_weight": weight, "output_dir": str(tmp_path / str(weight))}
        DistillPipeline(configure(**changes)).run()
    assert lines(tmp_path / "0.9", "train/loss") == lines(tmp_path / "1.0", "train/loss")
    with pytest.raises(LimbeckError, match="several objectives, and cross_tokenizer supports only one"):
        configure(**{**changes, "distill_loss_weight": 0.9, "rollout": {"on_policy_fraction": 0.5}})


@pytest.mark.parametrize("prompt", [{}, {"teacher.prompt.template": "{{ question }} It is {{ answer }}"}])
def test_packed_answers_of_the_student_give_the_losses_of_padded_ones(configure, cross, tmp_path, prompt):
    changes = {**cross, **prompt, "max_steps": 2, "eval_steps": 0, "sequence_length": 96}
    changes |= {"rollout": {"on_policy_fraction": 0.6, "max_new_tokens": 16}}
    packing = {
        "student.use_sequence_packing": True,
        "student.use_dynamic_batching_in_train": True,
        "student.max_tokens_per_microbatch_in_train": 128,
    }
    for name, more in {"padded": {}, "packed": packing}.items():
        DistillPipeline(configure(**changes, **more, output_dir=str(tmp_path / name))).run()
    for key in ("train/loss", "train/train_distill_loss", "student/grad_norm", "train/aligned_share"):
        assert lines(tmp_path / "packed", key) == pytest.approx(lines(tmp_path / "padded", key), rel=2e-5), key
    assert all(share > 0 for share in lines(tmp_path / "padded", "train/aligned_share"))
    assert lines(tmp_path / "padded", "rollout/mean_length")[0] > 4


def test_another_tokenizer_is_an_error_without_cross_tokenizer(configure, cross):
    with pytest.raises(LimbeckError, match=r"differ in \d+ of \d+ ids .* or set cross_tokenizer: hybrid"):
        DistillPipeline(configure(**{**cross, "cross_tokenizer": "off"})).run()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits_topk": 8}, "logits_topk cannot be combined with cross_tokenizer"),
        ({"teacher_pretrain": None, "distill_loss_weight": 0.0}, "needs the teacher's tokenizer; set teacher_pretrain"),
    ],
)
def test_unsupported_combinations_are_an_error(configure, cross, changes, message):
    with pytest.raises(LimbeckError, match=message):
        configure(**{**cross, **changes})


def test_rows_beyond_the_positions_of_the_teacher_are_distilled_as_far_as_it_can_read(configure, cross):
    config = configure(
        **cross, **{"max_steps": 2, "teacher.model_args.model_config_kwargs": {"max_position_embeddings": 34}}
    )
    DistillPipeline(config).run()
    shares = lines(Path(config.output_dir), "train/aligned_share")
    assert all(0 < share < 1 for share in shares)
    assert torch.tensor(lines(Path(config.output_dir), "train/loss")).isfinite().all()


@pytest.mark.processes
def test_two_ranks_give_the_losses_of_one(configure, settings, cross, tmp_path):
    # Each rank knows its own spans only; the mean is over those of both.
    changes = {**cross, "distill_loss_weight": 0.7, "max_steps": 4}
    DistillPipeline(configure(**changes, output_dir=str(tmp_path / "one"))).run()
    halves = {"student.training_args.per_device_train_batch_size": 4}
    train(settings(**changes, **halves, output_dir=str(tmp_path / "many")), tmp_path, 2)
    for key in ("train/loss", "train/train_distill_loss", "student/grad_norm", "train/aligned_share", "val/loss"):
        assert lines(tmp_path / "many", key) == pytest.approx(lines(tmp_path / "one", key), rel=1e-5, abs=1e-5), key
