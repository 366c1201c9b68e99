"""The script with Megatron-LM's arguments, run as a user runs it: in one process, without a GPU."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import make_corpus
from transformers import AutoModelForCausalLM

from limbeck.errors import USER_MISTAKE
from limbeck.models import ModelSource, load_model
from limbeck.models.megatron_checkpoint import write_checkpoint

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCRIPT = EXAMPLES / "pretrain_gpt.py"
STUDENT = """--num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --group-query-attention
    --num-query-groups 2 --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
    --untie-embeddings-and-output-weights --max-position-embeddings 64 --attention-dropout 0 --hidden-dropout 0"""
RUN = """--seq-length 16 --micro-batch-size 2 --global-batch-size 4 --train-iters 4 --lr 1e-2 --lr-decay-style cosine
    --lr-warmup-iters 1 --log-interval 1 --save-interval 2 --eval-interval 4 --eval-iters 2 --tokenizer-type
    HuggingFaceTokenizer"""


@pytest.fixture
def script(monkeypatch, tmp_path):
    """``script(text)`` returns the exit status; the working folder is empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def run(text: str, path: Path = SCRIPT) -> int:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [str(path), *text.split()])
        return module.main()

    return run


def losses(folder: str) -> dict[int, float]:
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def test_a_run_of_mock_data_starts_from_random_weights_stops_and_resumes_exactly(script, assets, capsys):
    teacher = f"--export-kd-teacher-load {assets / 'teacher'} --tokenizer-model {assets / 'teacher'}"
    text = f"{STUDENT} {RUN} {teacher} --mock-data"
    assert script(f"{text} --save whole --load whole") == 0
    assert "no GPU" in capsys.readouterr().err
    assert script(f"{text} --save parts --load parts --exit-interval 2") == 0
    assert losses("parts").keys() == {1, 2}
    assert script(f"{text} --save parts --load parts --exit-interval 2") == 0
    assert losses("parts") == losses("whole") and len(losses("whole")) == 4
    assert losses("whole")[4] < losses("whole")[1]


HYBRID = """--hybrid-override-pattern M-* --mamba-head-dim 8 --mamba-num-groups 2 --mamba-state-dim 8 --num-layers 3
    --hidden-size 32 --num-attention-heads 4 --position-embedding-type none --normalization RMSNorm --squared-relu
    --disable-bias-linear --untie-embeddings-and-output-weights --max-position-embeddings 64"""


@pytest.mark.parametrize(
    ("student", "kind"),
    [(f"{STUDENT} --num-experts 4 --moe-router-topk 2", "mixtral"), (HYBRID, "nemotron_h")],
)
def test_students_with_experts_and_with_mamba_layers_are_trained(script, assets, student, kind):
    teacher = f"--export-kd-teacher-load {assets / 'teacher'} --tokenizer-model {assets / 'teacher'}"
    assert script(f"{student} {RUN} {teacher} --mock-data --train-iters 2 --eval-iters 0 --save out") == 0
    assert json.loads(Path("out/student/config.json").read_text())["model_type"] == kind
    saved, student = (load_model(ModelSource(name), torch.float32) for name in ("./out/megatron", "./out/student"))
    assert saved.config.model_type == kind
    assert all(torch.equal(saved.state_dict()[name], tensor) for name, tensor in student.state_dict().items())
    assert len(losses("out")) == 2


def test_the_layers_of_pretrain_mamba_are_mamba_layers(script, assets):
    """With Megatron's own ``--spec``, and the number of layers from the pattern or from ``--num-layers``."""
    teacher = f"--export-kd-teacher-load {assets / 'teacher'} --tokenizer-model {assets / 'teacher'}"
    common = f"{HYBRID} {RUN} {teacher} --mock-data --train-iters 2 --eval-iters 0"
    common += " --spec megatron.core.models.mamba.mamba_layer_specs mamba_stack_spec"
    patterned = common.replace("--hybrid-override-pattern M-*", "--hybrid-layer-pattern MM").replace(
        "--num-layers 3", ""
    )
    plain = common.replace("--hybrid-override-pattern M-*", "").replace("--num-layers 3", "--num-layers 2")
    for text, save in ((patterned, "patterned"), (plain, "plain")):
        assert script(f"{text} --save {save}", EXAMPLES / "pretrain_mamba.py") == 0
    assert json.loads(Path("plain/student/config.json").read_text())["model_type"] == "nemotron_h"
    assert losses("patterned") == pytest.approx(losses("plain"), rel=1e-6)


def test_checkpoints_of_megatron_train_as_those_of_hugging_face(script, assets, tmp_path):
    """A blend of corpora and a distillation file; the teacher's rotary base is that of its model_config.yaml."""
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        # Without the padding token: Hugging Face models do not train its embedding.
        make_corpus(tmp_path / name, [random.integers(1, 290, 20).tolist() for _ in range(40)])
    (tmp_path / "kd.yaml").write_text(
        "logit_layers: [output_layer, output_layer]\nskip_lm_loss: false\nkd_loss_scale: 3.0\n"
        "intermediate_layer_pairs: [[decoder.final_layernorm, decoder.final_layernorm]]\n"
    )
    for role in ("student", "teacher"):
        model = AutoModelForCausalLM.from_pretrained(assets / role, dtype=torch.float32)
        if role == "teacher":
            model.config.rope_parameters["rope_theta"] = 500.0
            model.save_pretrained(tmp_path / "hf-teacher")
            model.config.rope_parameters["rope_theta"] = 10000.0  # wrong, as in a checkpoint without this argument
        write_checkpoint(model, tmp_path / role, 1)
    (tmp_path / "teacher" / "model_config.yaml").write_text(
        "rotary_base: 500\nshare_embeddings_and_output_weights: false\n"
    )
    common = f"""{RUN} --tokenizer-model {assets / "student"} --data-path 1 a 3 b --split 90,10,0
        --export-kd-distill-cfg kd.yaml"""
    assert script(f"{common} --load {assets / 'student'} --export-kd-teacher-load ./hf-teacher --save one") == 0
    assert (
        script(f"{common} --load ./student --use-checkpoint-args --export-kd-teacher-load ./teacher --save other") == 0
    )
    assert losses("one") == pytest.approx(losses("other"), rel=1e-6)
    lines = [json.loads(line) for line in (tmp_path / "other" / "metrics.jsonl").read_text().splitlines()]
    assert any("val/loss" in line for line in lines)
    assert (tmp_path / "other" / "student" / "model.safetensors").is_file()


def test_a_run_that_began_from_a_checkpoint_goes_on_exactly(script, assets, tmp_path, capsys):
    write_checkpoint(
        AutoModelForCausalLM.from_pretrained(assets / "student", dtype=torch.float32), tmp_path / "mcore", 1
    )
    teacher = f"--export-kd-teacher-load {assets / 'teacher'} --tokenizer-model {assets / 'student'}"
    text = f"{RUN} {teacher} --mock-data --eval-iters 0"
    assert script(f"{text} --load {assets / 'student'} --save whole") == 0
    for start, parts in ((assets / "student", "of-hf"), ("./mcore --use-checkpoint-args", "of-megatron")):
        assert script(f"{text} --load {start} --save {parts} --exit-interval 2") == 0
        assert losses(parts).keys() == {1, 2}
        assert script(f"{text} --load {parts} --save {parts} --norm-epsilon 0.5") == 0
        assert losses(parts) == pytest.approx(losses("whole"), rel=1e-6) and len(losses(parts)) == 4
        assert "--norm-epsilon" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("--num-layer 3", "--num-layer is not a flag, did you mean --num-layers?"),
        ("--data-path nowhere --split 1,0,0", "nowhere does not exist"),
        ("--num-experts 4 --moe-layer-freq 2 --mock-data", "moe_layer_freq (--moe-layer-freq) = 2"),
    ],
)
def test_a_mistake_is_one_sentence(script, assets, capsys, text, sentence):
    common = f"{STUDENT} {RUN} --tokenizer-model {assets / 'teacher'} --export-kd-teacher-load {assets / 'teacher'}"
    assert script(f"{common} {text}") == USER_MISTAKE
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("limbeck: ")]
    assert len(lines) == 1 and sentence in lines[0] and lines[0].endswith((".", "?")), lines
