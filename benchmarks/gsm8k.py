"""Compares cross-entropy training and distillation of the same student on GSM8K.

    python benchmarks/gsm8k.py --data FOLDER_WITH_train.jsonl_AND_test.jsonl --output runs/gsm8k

A byte-level BPE tokenizer of 4,096 tokens and a teacher of about 12 M parameters (6 layers × 384) are trained on the training
file. Then a student of 2 layers × 128 trains for 400 steps of 16 × 256 tokens, with each objective and on two data sets: the
whole training file and 600 packed rows of it. All tokens of questions and answers are supervised. The held-out loss is that of
the test file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from limbeck import DistillConfig, DistillPipeline
from limbeck.data import BatchStream, StreamSettings, tokenize_files
from limbeck.train.loop import RunResult


def make_start(folder: Path, train: Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    texts = [" ".join(json.loads(line).values()) for line in train.open()]
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=4096,
            special_tokens=["<pad>", "<eos>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    for name, layers, hidden, heads in (("teacher", 6, 384, 6), ("student", 2, 128, 4)):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=4096, hidden_size=hidden, intermediate_size=hidden * 8 // 3, num_hidden_layers=layers,
            num_attention_heads=heads, max_position_embeddings=512, tie_word_embeddings=True,
            bos_token_id=None, eos_token_id=1, pad_token_id=0,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def small_file(folder: Path, train: Path, packs: int) -> Path:
    """Write the first rows of the training file that fill ``packs`` sequences of 256 tokens; returns the file."""
    from limbeck.models import ModelSource, load_tokenizer

    lines, target = train.read_text().splitlines(keepends=True), folder / "small.jsonl"
    tokenizer = load_tokenizer(ModelSource(str(folder / "start" / "student")))
    low, high = 1, len(lines)
    while low < high:
        middle = (low + high + 1) // 2
        target.write_text("".join(lines[:middle]))
        examples, _ = tokenize_files([target], tokenizer, sequence_length=256, distill_on_prompt=True)
        stream = BatchStream(
            examples,
            StreamSettings(sequence_length=256, per_device_batch_size=1, pad_id=0, packing=True, length_round=1),
        )
        low, high = (middle, high) if stream.steps_per_epoch <= packs else (low, middle - 1)
    target.write_text("".join(lines[:low]))
    return target


def train_config(
    args: argparse.Namespace, name: str, start: Path, file: Path, teacher: Path | None, **keys
) -> DistillConfig:
    rate, steps = keys.pop("rate"), keys.pop("steps")
    return DistillConfig.model_validate(
        {
            "exp_name": name, "output_dir": str(args.output / name), "seed": args.seed,
            "student_pretrain": str(start), "teacher_pretrain": None if teacher is None else str(teacher),
            "sequence_length": 256, "distill_on_prompt": True, "max_steps": steps, "save_steps": 0, "eval_steps": 200,
            "logging_steps": 20, "track_with": "none", **keys,
            "student": {
                "model_args": {"dtype": args.dtype, "disable_gradient_checkpointing": True},
                "training_args": {
                    "learning_rate": rate, "lr_scheduler_type": "cosine", "warmup_ratio": 0.05, "weight_decay": 0.01,
                    "per_device_train_batch_size": 16,
                },
                "data_args": {"file_name": [str(file)], "cache_path": str(args.output / "tokens")},
                "use_sequence_packing": True, "infer_batch_size": 32,
            },
            "teacher": {"model_args": {"dtype": args.dtype}},
            "validation": {"data_args": {"file_name": [str(args.data / "test.jsonl")]}},
        }
    )  # fmt: skip


def run(config: DistillConfig) -> RunResult:
    result = DistillPipeline(config).run()
    if result.stopped_by:
        raise SystemExit(128 + result.stopped_by)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/gsm8k"))
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--teacher-steps", type=int, default=800)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument(
        "--teacher", type=Path, help="teacher of an earlier call, with its tokenizer; default: train one"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train = args.data / "train.jsonl"
    start = args.output / "start"
    make_start(start, train)
    teacher, lines = args.teacher, []
    if teacher is None:
        config = train_config(
            args,
            "teacher",
            start / "teacher",
            train,
            None,
            rate=1e-3,
            steps=args.teacher_steps,
            distill_loss_weight=0.0,
        )
        done = run(config)
        teacher = done.student
        lines.append(f"{'teacher':33} held-out loss {done.metrics['val/ce']:.3f}")
        print(lines[-1], flush=True)
    for label, file in (("600 packed rows", small_file(args.output, train, 600)), ("all training text", train)):
        for kind, weight in (("cross-entropy", 0.0), ("distilled", 1.0)):
            name = f"{label.split()[0]}-{kind}"
            config = train_config(
                args,
                name,
                start / "student",
                file,
                teacher,
                rate=2e-3,
                steps=args.steps,
                distill_loss_weight=weight,
            )
            metrics = run(config).metrics
            lines.append(
                f"{label:18} {kind:14} held-out loss {metrics['val/ce']:.3f}  KL from teacher {metrics['val/kd']:.3f}"
            )
            print(lines[-1], flush=True)
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
