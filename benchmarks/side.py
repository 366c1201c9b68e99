"""What benchmarks of two sides share: the environments of the compared libraries, which are created on first use in this
folder, the process of a side, models with random weights, and the file of results.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TRL = ("torch==2.13.0", "transformers==5.23.0", "accelerate==1.15.0", "datasets", "trl==1.16.0")
LIGER = ("torch==2.13.0", "liger_kernel==0.8.5")


def python_of(name: str, requirements: tuple[str, ...]) -> str:
    """The interpreter of the environment ``name`` with ``requirements``, of which the first is installed first."""
    folder = HERE / f".venv-{name}"
    stamp, wanted = folder / "installed.txt", "\n".join(requirements)
    python = str(folder / "bin" / "python")
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"creating the environment {folder} …", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", requirements[0]], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *requirements], check=True)
        stamp.write_text(wanted)
    return python


def write_json(path: Path, values: Any) -> None:
    """Write ``values`` to ``path``, which is never half-written, whenever this process is ended."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(values, indent=1))
    part.replace(path)


class Side:
    """The process of one side. It takes one step per request and returns the seconds. ``options`` are for its script."""

    def __init__(
        self, name: str, python: str, folder: Path, dtype: str, steps: int, script: str = "step_sides.py", *options: str
    ) -> None:
        self.name = name
        command = [python, str(HERE / script), name, str(folder), dtype, str(steps), *options]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.receive()

    def receive(self) -> dict:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        raise SystemExit(f"{self.name} ended unexpectedly; see its output above")

    def request(self, what: str = "step") -> dict:
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self.receive()


def numbered_words(vocab: int) -> dict[str, int]:
    """The ids of ``vocab`` words: three special tokens, w3, w4 and so on."""
    return {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, vocab)}}


def save_models(folder: Path, models: dict[str, dict], words: dict[str, int], **special: str) -> None:
    """Write Llama models with random weights under their names, each with a tokenizer with one token per word.

    models: configuration of each. words: token ids. special: special tokens beside ``pad_token``, the first word.
    """
    import torch
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    end = special["eos_token"]
    backend = Tokenizer(WordLevel(words, unk_token=next(reversed(words))))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, **{"pad_token": next(iter(words)), **special},
        chat_template="{% for m in messages %}{{ m['content'] + (' END' if m['role'] == 'assistant' else ' ') }}{% endfor %}"
        .replace("END", end),
    )  # fmt: skip
    for name, config in models.items():
        torch.manual_seed(name == "teacher")
        LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
