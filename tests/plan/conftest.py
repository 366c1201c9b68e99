"""Models that consist of a config.json only, and rows that fill the sequence."""

import json

import pytest

MODEL = {
    "model_type": "qwen2",
    "vocab_size": 320,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


@pytest.fixture
def from_config(settings, tmp_path):
    """``from_config(**changes)``: settings of a run whose models are random and have different widths."""

    def build(**changes) -> dict:
        for role, hidden in (("student", 128), ("teacher", 96)):
            folder = tmp_path / role
            folder.mkdir(exist_ok=True)
            (folder / "config.json").write_text(json.dumps({**MODEL, "hidden_size": hidden}))
        filled = [{"text": "What is 3 plus 4 indeed? " * 200}] * 32
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in filled))
        own = {
            "tokenizer": settings()["student_pretrain"],
            "student_pretrain": str(tmp_path / "student"),
            "teacher_pretrain": str(tmp_path / "teacher"),
            "student.model_args.from_scratch": True,
            "teacher.model_args.from_scratch": True,
            "student.data_args.file_name": str(tmp_path / "rows.jsonl"),
            "distill_on_prompt": True,
            "compile_model": False,
            "compile_loss": False,
            "sequence_length": 128,
        }
        return settings(**{**own, **changes})

    return build
