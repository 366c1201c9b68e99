"""Models sliced over ranks or divided into stages, and rows divided among them, give what one process gives."""

import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from ranks import run_on_ranks
from runs import assert_same_weights, comparable, forget_after, metrics, rows
from safetensors.torch import load_file, save_file
from tiny import make_data, make_model
from transformers import AutoConfig, AutoModelForCausalLM

from limbeck import DistillPipeline
from limbeck.config import load_mapping
from limbeck.errors import LimbeckError
from limbeck.strategies.model_parallel import check_model_parallel
from limbeck.strategies.parallel_dims import ParallelDims
from limbeck.strategies.world import World
from limbeck.train.build.student import resolve_parallelism

KEYS = ("train/loss", "train/train_distill_loss", "student/grad_norm", "val/loss", "val/top1_agreement")
TP, CP, PP = "tensor_model_parallel_size", "context_parallel_size", "pipeline_model_parallel_size"
SP = {"sequence_parallel": True}


def spread(student: dict[str, int], teacher: dict[str, int] | None = None) -> dict:
    """Sizes for the student and, unless given otherwise, the same for the teacher."""
    return {
        f"{role}.strategy_args.strategy_config.{key}": value
        for role, sizes in (("student", student), ("teacher", student if teacher is None else teacher))
        for key, value in sizes.items()
    }


def in_host_memory(*roles: str) -> dict:
    return {f"{role}.strategy_args.strategy_config.offload_policy": True for role in roles}


def planned(role: str, plan: dict[str, str] | str) -> dict:
    return {f"{role}.strategy_args.strategy_config.tensor_parallel_plan": plan}


PACKED = {"student.use_sequence_packing": True, "sequence_length": 96}
RECOMPUTED = {"student.model_args.disable_gradient_checkpointing": False, "student.sequence_length_round_in_train": 1}
FROZEN = {"kd_objective": "adaptive_kl", "student.model_args.freeze_module_prefix": "model.layers.0"}
# The pattern puts different kinds of layers on the stages of a pipeline.
HYBRID = {"kind": "nemotron_h", "hybrid_override_pattern": "M-M*-", "head_dim": 8, "mamba_num_heads": 4, "mamba_head_dim": 16,
          "n_groups": 2, "ssm_state_size": 8, "chunk_size": 16}  # fmt: skip
# As NeMo-RL's plan with whole sums: the last matrix of a block is sliced by columns too.
GATHERED = {"layers.*.self_attn.o_proj": "colwise_gather", "layers.*.self_attn.[qkv]_proj": "colwise",
            "layers.*.mlp.down_proj": "colwise_gather", "layers.*.mlp.[gu]*_proj": "colwise"}  # fmt: skip
# Vocabularies that are uneven or padded, tied or not; key heads fewer than ranks, with norms of their own.
STUDENTS = {
    "plain": {},
    "tied": {"vocab_size": 333, "tie_word_embeddings": True},
    "llama": {"kind": "llama", "vocab_size": 325, "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
    "qwen3": {"kind": "qwen3", "head_dim": 8},
    "sliding": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "hybrid": HYBRID,
    "deep": {"layers": 3, "tie_word_embeddings": True},
}
CASES = {  # ranks, student, what one process and many have in common, what only many have
    "tp2": (2, "tied", {}, {**rows(8), **spread({TP: 2})}),
    "tp2, given plans": (2, "qwen3", {}, {**rows(8), **spread({TP: 2}), **planned("student", GATHERED),
                                          **planned("teacher", "given_plans.in_styles_of_pytorch")}),
    "dp2 in host memory": (2, "tied", {}, {**rows(4), **in_host_memory("student", "teacher")}),
    "tp2, whole teacher": (2, "plain", FROZEN, {**rows(4, 2), **spread({TP: 2}, {})}),
    "teacher tp2, student dp2": (2, "plain", PACKED, {**rows(4), **spread({}, {TP: 2})}),
    "cp2": (2, "sliding", {}, {**rows(8), **spread({CP: 2})}),
    "cp2, packed": (2, "plain", PACKED, {**rows(8), **spread({CP: 2}, {TP: 2})}),
    "tp2 with sequence": (2, "llama", RECOMPUTED, {**rows(8), **spread({TP: 2, **SP})}),
    "pp2, one micro-batch": (2, "sliding", FROZEN, {**rows(8), **spread({PP: 2}, {})}),
    "pp2, hybrid": (2, "hybrid", PACKED, {**rows(2, 4), **spread({PP: 2}, {TP: 2})}),
    "tp2, hybrid": (2, "hybrid", RECOMPUTED, {**rows(8), **spread({TP: 2}, {})}),
    "pp2, packed": (2, "deep", {**PACKED, **RECOMPUTED}, {**rows(2, 4), **spread({PP: 2})}),
    "dp2 x tp2, teacher cp2": (4, "llama", {}, {**rows(4), **spread({TP: 2}, {CP: 2}), **in_host_memory("student")}),
    "cp2 x tp2, teacher tp4": (4, "qwen3", {}, {**rows(8), **spread({TP: 2, CP: 2}, {TP: 4})}),
    "dp2, teacher cp2 x tp2": (4, "plain", PACKED, {**rows(2), **spread({}, {TP: 2, CP: 2})}),
    "pp2 x tp2 with sequence": (4, "llama", RECOMPUTED, {**rows(2, 4), **spread({PP: 2, TP: 2, **SP}, {TP: 4, **SP}),
                                                         **planned("teacher", GATHERED)}),
    "dp2 x pp2, teacher pp2 x cp2": (4, "deep", PACKED, {**rows(2, 2), **spread({PP: 2}, {PP: 2, CP: 2})}),
    "dp2 x tp2 x pp2, teacher tp2 x cp2 x pp2": (
        8, "plain", {}, {**rows(2, 2), **spread({TP: 2, PP: 2}, {TP: 2, CP: 2, PP: 2})},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Every case run by one process in ``<case>/one`` and by its ranks in ``<case>/many``."""
    folder = tmp_path_factory.mktemp("layouts")
    make_model(folder / "teacher", hidden=32, layers=2, seed=1, num_key_value_heads=4)
    for path in (folder / "teacher").glob("tokenizer*"):  # Transformers reads one file as another tokenizer for llama
        path.unlink()
    for name, changes in STUDENTS.items():
        make_model(folder / name, **changes)
    calm(folder / "qwen3" / "model.safetensors")
    make_data(folder / "rows.jsonl", 48)
    return folder


def calm(path: Path) -> None:
    """Norms of queries and keys as they are in a fresh model; three times that, attention is so sharp that rounding grows."""
    weights = load_file(path)
    for name in weights:
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            weights[name] /= 3
    save_file(weights, path, {"format": "pt"})


def configuration(folder: Path, output: Path, student: str, **changes) -> dict:
    validation = {"eval_steps": 4, "validation.data_args.file_name": [str(folder / "rows.jsonl")]}
    return comparable(folder, output, student, **{**rows(8), "logging_steps": 1, **validation, **changes})


def run_ranks(ranks: int, configurations: dict[Path, dict]) -> None:
    for path, settings in configurations.items():
        path.write_text(yaml.safe_dump(settings))
    run_on_ranks(ranks, str(Path(__file__).with_name("run_configurations.py")), *map(str, configurations))


@pytest.mark.processes
@pytest.mark.parametrize("ranks", [2, 4, pytest.param(8, marks=pytest.mark.workers)])
def test_a_layout_gives_the_losses_and_the_student_of_one_process_and_takes_its_checkpoint(folder, tmp_path, ranks):
    cases = {name: case for name, case in CASES.items() if case[0] == ranks}
    files = {}
    _, first, common_of_first, _ = next(iter(cases.values()))
    for i, (_, student, common, changes) in enumerate(cases.values()):
        one = tmp_path / f"{i}-one"
        DistillPipeline(load_mapping(configuration(folder, one, student, **common)).config).run()
        files[tmp_path / f"{i}.yaml"] = configuration(folder, tmp_path / str(i), student, **{**common, **changes})
    # A run goes on where one process has begun it, and where ranks with another layout have.
    begun, moved = tmp_path / "begun", tmp_path / "moved"
    shutil.copytree(tmp_path / "0-one", begun, symlinks=True)
    forget_after(begun, 2)
    files[tmp_path / "begun.yaml"] = {
        **files[tmp_path / "0.yaml"],
        "output_dir": str(begun),
        "resume_from_checkpoint": True,
    }
    files[tmp_path / "moved.yaml"] = {
        **configuration(folder, moved, first, **common_of_first, **rows(2, 8 // ranks), **spread({PP: 2}, {})),
        "resume_from_checkpoint": str(tmp_path / "0" / "checkpoint-2"),
    }
    run_ranks(ranks, files)
    for i, name in enumerate(cases):
        one, many = tmp_path / f"{i}-one", tmp_path / str(i)
        for key in KEYS:
            assert metrics(many, key) == pytest.approx(metrics(one, key), rel=1e-5, abs=1e-5), f"{name}: {key}"
        assert_same_weights(one / "student", many / "student", tolerance=1e-5)
    for resumed in (begun, moved):
        assert_same_weights(tmp_path / "0-one" / "student", resumed / "student", tolerance=1e-5)

    # And back: what the stages of the last case have saved goes on in one process.
    last = len(cases) - 1
    _, student, common, _ = list(cases.values())[last]
    forget_after(tmp_path / str(last), 2)
    again = configuration(folder, tmp_path / str(last), student, **common, resume_from_checkpoint=True)
    DistillPipeline(load_mapping(again).config).run()
    assert_same_weights(tmp_path / f"{last}-one" / "student", tmp_path / str(last) / "student", tolerance=1e-5)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            spread({TP: 2}, {}),
            "= 2 × 1 × 1 does not divide the 1 process; make their product 1, or start another number",
        ),
        (spread({}, {CP: 4}), "= 1 × 4 × 1 does not divide the 1 process;"),
        (spread({PP: 2}, {}), "= 1 × 1 × 2 does not divide the 1 process;"),
    ],
)
def test_sizes_that_do_not_divide_the_processes_are_refused(folder, tmp_path, changes, sentence):
    config = load_mapping(configuration(folder, tmp_path / "out", "plain", **changes)).config
    with pytest.raises(LimbeckError, match=re.escape(sentence)):
        DistillPipeline(config).run()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (spread({TP: 2}, {CP: 3}), "2 ranks hold one student and 3 one teacher"),
        (
            {**spread({TP: 2}), "student.model_args.lora_target": "all-linear"},
            "with lora_target is not built yet; use 1",
        ),
        (
            {**spread({PP: 2}), "student.model_args.lora_target": "all-linear"},
            "pipeline_model_parallel_size = 2 with lora_target is not built yet; use 1",
        ),
        ({**spread({CP: 2}, {}), "features.pairs": [["model.layers.0", "model.layers.0"]]}, "features.pairs with"),
        ({**spread({CP: 2}), "cross_tokenizer": "hybrid"}, "with cross_tokenizer is not built yet; set all to 1"),
    ],
)
def test_combinations_that_are_not_built_are_refused(folder, tmp_path, changes, sentence):
    config = load_mapping(configuration(folder, tmp_path / "out", "plain", **changes)).config
    with pytest.raises(LimbeckError, match=re.escape(sentence)):
        resolve_parallelism(config, World(0, 6, torch.device("cpu")))


@pytest.mark.parametrize(
    ("changes", "dims", "sentence"),
    [
        ({"num_attention_heads": 8, "hidden_size": 64}, ParallelDims(tp=3),
         "student.strategy_args.strategy_config.tensor_model_parallel_size = 3 does not divide the 8 attention heads (2 of "
         "keys and values) of tiny; use 1, 2, 4 or 8."),
        ({"intermediate_size": 62}, ParallelDims(tp=4), "= 4 does not divide the 62 features of"),
        ({}, ParallelDims(tp=2, cp=4), "context_parallel_size = 4 does not divide the 2 attention heads"),
        ({"kind": "gpt2"}, ParallelDims(tp=2), "comes without a plan for tensor parallelism"),
        ({"kind": "gpt2"}, ParallelDims(pp=2), "comes without a plan for pipelines (base_model_pp_plan); use 1"),
        (HYBRID, ParallelDims(cp=2), "context_parallel_size = 2: tiny has recurrent layers (Mamba), which need whole rows"),
        (HYBRID, ParallelDims(tp=2, sequence_parallel=True), "sequence_parallel = true: tiny has recurrent layers"),
        ({}, ParallelDims(pp=3), "pipeline_model_parallel_size = 3 is more than the layers of tiny (1); use at most that"),
    ],
)  # fmt: skip
def test_sizes_that_a_model_does_not_take_are_refused_with_those_that_it_takes(changes, dims, sentence):
    kind = changes.get("kind", "qwen2")
    settings = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
                "num_hidden_layers": 1, "vocab_size": 64}  # fmt: skip
    given = {} if kind == "gpt2" else {key: value for key, value in {**settings, **changes}.items() if key != "kind"}
    config = AutoConfig.for_model(kind, **given)
    if kind == "gpt2":
        config.n_layer, config.n_embd, config.n_head, config.vocab_size = 1, 32, 4, 64
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(LimbeckError, match=re.escape(sentence)):
        check_model_parallel(model, dims, "tiny", "student")


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        ({**GATHERED, "layers.*.mixer.up_proj": "colwise"},
         "tensor_parallel_plan: the pattern layers.*.mixer.up_proj matches no module of Qwen3Model, whose matrices have names "
         "like layers.0.self_attn.q_proj"),
        ({**GATHERED, "layers.*.mlp.*_proj": "colwise"},
         "the patterns layers.*.mlp.[gu]*_proj and layers.*.mlp.*_proj both match layers.0.mlp.gate_proj; let one of"),
        ({"model.layers.*.mlp.up_proj": "columns"}, "columns is not a style of layers.0.mlp.up_proj; use one of colwise,"),
        ({"layers.*.mlp.up_proj": "colwise"}, "it slices layers.0.mlp but not layers.0.mlp.gate_proj, whose gradients"),
        ({"layers.*.input_layernorm": "rowwise"}, "slices layers.0.input_layernorm in a way (rowwise) that is not built"),
        ("5", "5 is neither a mapping of module names to styles nor the path of one"),
        ("nowhere.plan", "nowhere.plan cannot be imported (ModuleNotFoundError: No module named 'nowhere'); it must be"),
        ("os.path", "os.path is a module; it must be a mapping"),
    ],
)  # fmt: skip
def test_a_plan_that_does_not_fit_is_refused(plan, sentence):
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    config = AutoConfig.for_model("qwen3", num_hidden_layers=1, vocab_size=64, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(LimbeckError, match=re.escape(sentence)):
        check_model_parallel(model, ParallelDims(tp=2, tp_plan=plan), "tiny", "student")
