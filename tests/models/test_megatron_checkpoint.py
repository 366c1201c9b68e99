"""Megatron-LM's checkpoints as Hugging Face models, and back."""

import importlib.util
import itertools
import json
import pickle
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from runs import weights
from tiny import make_tokenizer
from transformers import AutoModelForCausalLM

from limbeck.cli import main
from limbeck.errors import LimbeckError
from limbeck.megatron_files.arguments import stored_arguments
from limbeck.models import ModelSource, load_model, megatron_hybrid_config
from limbeck.models.megatron_checkpoint import arguments_of, loading_flags, open_checkpoint, write_checkpoint
from limbeck.models.megatron_config import hf_config
from limbeck.models.megatron_families import FAMILIES, HEAD, Heads, slice_of

needs_megatron = pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="needs limbeck[megatron]")

SHAPE = {
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "group_query_attention": True,
    "kv_channels": 16,
    "max_position_embeddings": 16384,
    "position_embedding_type": "rope",
    "rotary_base": 10000,
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-6,
    "swiglu": True,
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
    "vocab_size": 300,
    "padded_vocab_size": 384,
}
DENSE = {
    "llama": {"use_rope_scaling": True},
    "qwen2": {"add_qkv_bias": True, "untie_embeddings_and_output_weights": False, "rotary_base": 1000000},
    "qwen3": {"qk_layernorm": True, "kv_channels": 8, "rotary_seq_len_interpolation_factor": 2.0},
}
EXPERTS = {
    "mixtral": {"num_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 96},
    "qwen3_moe": {
        "num_experts": 4,
        "moe_router_topk": 3,
        "moe_ffn_hidden_size": 32,
        "moe_router_pre_softmax": True,
        "moe_layer_freq": [0, 1, 1, 1],
        "qk_layernorm": True,
    },
}
HYBRID = {
    "nemotron_h": {
        "hybrid_override_pattern": "M-M*",
        "mamba_state_dim": 8,
        "mamba_head_dim": 8,
        "mamba_num_groups": 4,
        "mamba_num_heads": 12,
        "position_embedding_type": "none",
        "swiglu": False,
        "squared_relu": True,
        "norm_epsilon": 1e-5,
    }
}
ARCHITECTURES = DENSE | EXPERTS | HYBRID


def make(kind: str):
    """A Hugging Face model of one of ``ARCHITECTURES``, with no constant parameters."""
    torch.manual_seed(0)
    read_arguments = megatron_hybrid_config.hf_config if kind in HYBRID else hf_config
    config = read_arguments(SHAPE | ARCHITECTURES[kind], "here")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def read(folder: Path, **options):
    return load_model(ModelSource(str(folder), "student", **options), torch.float32)


def assert_same(found, expected) -> None:
    other = {"dtype": None, "_name_or_path": None}
    assert found.config.to_dict() | other == expected.config.to_dict() | other
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


EXPERT_NAMES = {
    "SequentialMLP": lambda number, matrices: {
        f"local_experts.{i}.linear_fc{number}.weight": matrix for i, matrix in enumerate(matrices)
    },
    "TEGroupedMLP": lambda number, matrices: {
        f"linear_fc{number}.weight{i}": matrix for i, matrix in enumerate(matrices)
    },
    "GroupedMLP": lambda number, matrices: {
        f"weight{number}": matrices.transpose(1, 2).reshape((64, -1) if number == 1 else (-1, 64))
    },
}
"""How Megatron's modules for experts name the matrices [experts, rows, columns] of a rank."""


def transformer_engine_name(name: str, kind: str) -> str:
    name = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
    if kind not in EXPERTS:
        name = name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
    if kind in HYBRID:
        name = name.replace("*.norm.", "*.mixer.in_proj.layer_norm_").replace("final_layernorm", "final_norm")
    return name


def write_legacy(
    model,
    folder: Path,
    tensor: int = 2,
    pipeline: int = 2,
    virtual: int = 1,
    expert: int = 1,
    module: str = "SequentialMLP",
    **options,
) -> Path:
    """The model in Megatron's format torch, with the names of Transformer Engine's layers."""
    config, tensors = model.config, dict(model.named_parameters(remove_duplicate=False))
    heads, slices = Heads.of(config), options.get("expert_tensor_parallel_size", tensor)
    sizes = {"tensor": tensor, "pipeline": pipeline, "expert": expert}
    arguments = arguments_of(config) | {f"{axis}_model_parallel_size": size for axis, size in sizes.items()}
    arguments |= {"padded_vocab_size": 384, **options}
    per_chunk, last = config.num_hidden_layers // (pipeline * virtual), pipeline * virtual - 1
    for t, p, e in itertools.product(range(tensor), range(pipeline), range(expert)):
        if (e - t) % (tensor // slices):
            continue  # with undivided experts, neighbouring ranks of tensor parallelism have others of them
        chunks: list = [{"decoder.layers.0.mlp.linear_fc1._extra_state": None} for _ in range(virtual)]
        for one in FAMILIES[config.model_type].parameters(model):
            if one.sources == (HEAD,) and config.tie_word_embeddings and pipeline == 1:
                continue  # a stage apart from the first holds a copy
            at = 0 if one.name.startswith("embedding") else last
            stage, local = (at, None) if one.layer is None else divmod(one.layer, per_chunk)
            if stage % pipeline != p:
                continue
            sources, chunk = [tensors[source] for source in one.sources], chunks[stage // pipeline]
            if one.kind == "vocabulary":
                sources = [torch.nn.functional.pad(sources[0], (0, 0, 0, 84))]
            if one.kind.startswith("experts"):
                own = slice_of(one.kind, sources, heads, t % slices, slices).chunk(expert)[e]
                named = EXPERT_NAMES[module](1 if one.kind == "experts_gate_up" else 2, own)
                chunk |= {f"decoder.layers.{local}.mlp.experts.{name}": x.clone() for name, x in named.items()}
            else:
                name = transformer_engine_name(one.name, config.model_type).replace("*", str(local))
                chunk[name] = slice_of(one.kind, sources, heads, t, tensor).clone()
        name = f"mp_rank_{t:02d}" + f"_{p:03d}" * (pipeline > 1) + f"_{e:03d}" * (expert > 1)
        path = folder / "iter_0000010" / name / "model_optim_rng.pt"
        path.parent.mkdir(parents=True)
        names = ["model"] if virtual == 1 else [f"model{v}" for v in range(virtual)]
        content = {"args": Namespace(**arguments), "iteration": 10, **dict(zip(names, chunks, strict=True))}
        torch.save(content, path)
    (folder / "latest_checkpointed_iteration.txt").write_text("10")
    return folder


@pytest.mark.parametrize("form", ["torch_dist", "torch"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_what_is_written_is_read_again(kind, form, tmp_path):
    model = make(kind)
    folder = write_checkpoint(model, tmp_path, 7, form=form)
    assert folder == tmp_path / "iter_0000007"
    assert_same(read(tmp_path), model)
    assert_same(read(folder), model)
    assert stored_arguments(str(tmp_path)) == open_checkpoint(str(folder)).arguments != {}


def test_the_flags_for_megatron_are_what_it_does_not_take_from_the_checkpoint():
    found = {kind: loading_flags(make(kind).config) for kind in ARCHITECTURES}
    assert found == {
        "llama": "--use-checkpoint-args --norm-epsilon 1e-06 --use-rope-scaling --rope-scaling-factor 8",
        "qwen2": "--use-checkpoint-args --norm-epsilon 1e-06",
        "qwen3": "--use-checkpoint-args --norm-epsilon 1e-06 --qk-layernorm --rotary-seq-len-interpolation-factor 2",
        "mixtral": "--use-checkpoint-args --norm-epsilon 1e-06",
        "qwen3_moe": "--use-checkpoint-args --norm-epsilon 1e-06 --qk-layernorm",
        "nemotron_h": "--use-checkpoint-args --norm-epsilon 1e-05 --spec "
        "megatron.core.models.mamba.mamba_layer_specs mamba_stack_spec",
    }


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        ("org/name", {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "org/name"}),
        ("null:63", {"tokenizer_type": "NullTokenizer"}),
        (
            "gpt2:a/v.json,a/m.txt",
            {"tokenizer_type": "GPT2BPETokenizer", "vocab_file": "a/v.json", "merge_file": "a/m.txt"},
        ),
    ],
)
def test_the_tokenizer_of_the_run_is_written_as_megatron_names_it(tokenizer, expected, tmp_path):
    model = make("llama")
    write_checkpoint(model, tmp_path, 1, tokenizer)
    stored = open_checkpoint(str(tmp_path)).arguments
    assert {name: stored[name] for name in expected} == expected
    assert_same(read(tmp_path), model)


def test_classes_that_other_libraries_allow_change_nothing(tmp_path):
    """megatron.core makes Namespace a class that torch.load builds; the arguments are read all the same."""
    model = make("llama")
    write_checkpoint(model, tmp_path / "written", 1)
    write_legacy(model, tmp_path / "legacy")
    with torch.serialization.safe_globals([Namespace]):
        for name in ("written", "legacy"):
            assert_same(read(tmp_path / name), model)
        assert Namespace in torch.serialization.get_safe_globals()


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("llama", {}),
        ("qwen2", {"virtual": 2}),
        ("qwen3", {"virtual": 2}),
        ("nemotron_h", {}),
        ("mixtral", {"expert": 2}),
        ("mixtral", {"pipeline": 1, "expert": 2, "module": "TEGroupedMLP"}),
        ("mixtral", {"pipeline": 1, "expert": 4, "expert_tensor_parallel_size": 1}),
        ("qwen3_moe", {"expert": 2, "virtual": 2, "module": "GroupedMLP"}),
    ],
)
def test_the_files_of_all_ranks_are_merged(kind, layout, tmp_path):
    model = make(kind)
    assert_same(read(write_legacy(model, tmp_path, **layout)), model)


def test_the_whole_model_is_in_memory_once(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr("limbeck.models.load.load_weights", lambda *given: made.append(load_weights(*given)) or made[0])
    from limbeck.models.megatron_checkpoint import load_weights

    write_checkpoint(make("llama"), tmp_path, 1)
    parameters = dict(load_model(ModelSource(str(tmp_path)), torch.bfloat16).named_parameters())
    assert all(parameters[name].data_ptr() == made[0][name].data_ptr() for name in parameters)


def test_given_arguments_replace_those_of_the_checkpoint(tmp_path):
    write_checkpoint(make("llama"), tmp_path, 1)
    config = read(tmp_path, megatron_arguments={"rotary_base": 500000, "vocab_size": 250}).config
    assert config.rope_parameters["rope_theta"] == 500000
    assert config.vocab_size == 250


def test_rows_beyond_the_tokenizer_are_left_out(tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    write_legacy(make("qwen2"), tmp_path / "megatron", vocab_size=None)
    model = read(tmp_path / "megatron", megatron_arguments={"tokenizer_model": str(tmp_path / "tokenizer")})
    assert model.lm_head.weight.shape[0] == model.config.vocab_size == len(make_tokenizer()) == 299
    write_legacy(make("qwen2"), tmp_path / "small", vocab_size=None, padded_vocab_size=128)
    with pytest.raises(
        LimbeckError, match="has 299 tokens, and the vocabulary of the model has 128 rows; set the token"
    ):
        read(tmp_path / "small", megatron_arguments={"tokenizer_model": str(tmp_path / "tokenizer")})


def test_the_command_converts_there_and_back(tmp_path, capsys):
    model = make("qwen3")
    model.save_pretrained(tmp_path / "hf")
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "megatron"), "--iteration", "3"]) == 0
    assert main(["convert", str(tmp_path / "megatron"), str(tmp_path / "again")]) == 0
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), model)
    legacy = str(tmp_path / "legacy")
    assert main(["convert", str(tmp_path / "hf"), legacy, "--format", "torch", "--transformer-impl", "local"]) == 0
    file = tmp_path / "legacy" / "iter_0000000" / "mp_rank_00" / "model_optim_rng.pt"
    assert "decoder.layers.0.input_layernorm.weight" in torch.load(file, weights_only=False)["model"]
    assert_same(read(tmp_path / "legacy"), read(tmp_path / "megatron"))
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "other"), "--transformer-impl", "local"]) == 2
    assert "--transformer-impl selects the names of --format torch" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "again")]) == 2
    assert "exists; name a new folder" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    (tmp_path / "hf").rename(tmp_path / "run" / "checkpoint-4")  # an interrupted run, without student/
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "of_run"), "--iteration", "4"]) == 0
    assert_same(read(tmp_path / "of_run"), read(tmp_path / "megatron"))
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "below"), "--iteration", "-1"]) == 2
    assert "--iteration = -1 must be at least 0." in capsys.readouterr().err


def test_the_command_reads_the_iteration_that_is_named(tmp_path, capsys):
    older, newer = make("llama"), make("llama")
    with torch.no_grad():
        newer.model.norm.weight.add_(1)
    for model, iteration in ((older, 1), (newer, 2)):
        model.save_pretrained(tmp_path / "hf")
        assert (
            main(["convert", str(tmp_path / "hf"), str(tmp_path / f"{iteration}"), "--iteration", f"{iteration}"]) == 0
        )
    (tmp_path / "1" / "iter_0000001").rename(tmp_path / "2" / "iter_0000001")
    for arguments, model in (([], newer), (["--iteration", "1"], older), (["--iteration", "2"], newer)):
        written = tmp_path / f"of {arguments}"
        assert main(["convert", str(tmp_path / "2"), str(written), *arguments]) == 0
        assert_same(AutoModelForCausalLM.from_pretrained(written), model)
    for arguments, message in (
        (["--iteration", "99"], "iter_0000099; name another --iteration"),
        (["--format", "torch"], "is read in its own format; remove --format"),
    ):
        assert main(["convert", str(tmp_path / "2"), str(tmp_path / "other"), *arguments]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("form", ["torch_dist", "torch"])
@pytest.mark.parametrize("kind", EXPERTS | HYBRID)
def test_the_command_writes_the_names_of_the_hub(kind, form, tmp_path):
    """For these kinds they differ from those in memory."""
    make(kind).save_pretrained(tmp_path / "hf")
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "megatron"), "--format", form]) == 0
    assert main(["convert", str(tmp_path / "megatron"), str(tmp_path / "again")]) == 0
    expected, found = weights(tmp_path / "hf"), weights(tmp_path / "again")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class _Malicious:
    def __reduce__(self):
        return exec, ("raise SystemExit('the pickle ran')",)


def _no_tracker(folder: Path) -> None:
    (folder / "latest_checkpointed_iteration.txt").unlink()


def _bad_tracker(folder: Path) -> None:
    (folder / "latest_checkpointed_iteration.txt").write_text("newest")


def _no_iteration(folder: Path) -> None:
    shutil.rmtree(folder / "iter_0000010")


def _unknown_format(folder: Path) -> None:
    shutil.rmtree(folder / "iter_0000010")
    (folder / "iter_0000010").mkdir()


def _missing_rank(folder: Path) -> None:
    shutil.rmtree(folder / "iter_0000010" / "mp_rank_01_001")


def _cut_off(folder: Path) -> None:
    path = folder / "iter_0000010" / "mp_rank_00_000" / "model_optim_rng.pt"
    path.write_bytes(path.read_bytes()[:1000])


def _without_arguments(folder: Path) -> None:
    for path in (folder / "iter_0000010").glob("*/*.pt"):
        torch.save({**torch.load(path, weights_only=False), "args": None}, path)


def _malicious(folder: Path) -> None:
    path = folder / "iter_0000010" / "mp_rank_00_000" / "model_optim_rng.pt"
    torch.save({"model": _Malicious()}, path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_no_tracker, "has no latest_checkpointed_iteration.txt that names its newest checkpoint; use the path of"),
        (_bad_tracker, "names 'newest', which is neither an iteration nor release; correct it"),
        (_no_iteration, "names iter_0000010, but there is no such folder"),
        (_unknown_format, "iter_0000010 is no checkpoint of Megatron-LM in the format torch_dist"),
        (_missing_rank, "has no file of tensor-parallel rank 1 and pipeline rank 1, .* saved by 2 x 2 of them"),
        (_cut_off, "is damaged or no file of torch.save"),
        (_without_arguments, "num_layers is missing; set it in model_args.megatron_arguments"),
        (_malicious, "holds a builtins.exec, which would have to be unpickled, .* --ckpt-format torch_dist"),
    ],
)
def test_a_checkpoint_that_cannot_be_read_is_one_sentence(change, sentence, tmp_path):
    write_legacy(make("qwen2"), tmp_path)
    change(tmp_path)
    with pytest.raises(LimbeckError, match=sentence):
        read(tmp_path)


def test_a_model_of_mamba_layers_alone_is_recognised_by_them(tmp_path):
    """Megatron-LM stores the same arguments for it as for a GPTModel."""
    config = megatron_hybrid_config.hf_config(
        SHAPE | HYBRID["nemotron_h"] | {"hybrid_override_pattern": "MMMM"}, "here"
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    write_legacy(model, tmp_path, hybrid_override_pattern=None, is_hybrid_model=False)
    assert_same(read(tmp_path), model)


@pytest.mark.parametrize(
    ("options", "removed", "sentence"),
    [
        ({"num_experts": 3}, None, "expert_model_parallel_size = 2 in its arguments does not divide num_experts = 3"),
        (
            {"num_experts": 8, "module": "GroupedMLP"},
            None,
            r"layers.0.mlp.experts.experts.linear_fc1.weight has the shape",
        ),
        (
            {"num_experts": 14, "module": "GroupedMLP"},
            None,
            r"mp_rank_00_000_000.* has experts of the shape \[64, 192\], which are not 7 matrices as num_experts",
        ),
        (
            {},
            "mp_rank_00_001_001",
            "rank 0 and pipeline rank 1 with expert-parallel rank 1, .* saved by 2 x 2 x 2 of them",
        ),
        (
            {},
            "mp_rank_01_000_*",
            "rank 1 and pipeline rank 0 with expert-parallel rank 0, .* saved by 2 x 2 x 2 of them",
        ),
    ],
)
def test_files_of_experts_that_do_not_fit_together_are_one_sentence(options, removed, sentence, tmp_path):
    folder = write_legacy(make("mixtral"), tmp_path, expert=2, **options) / "iter_0000010"
    for path in folder.glob(removed) if removed else ():
        shutil.rmtree(path)
    with pytest.raises(LimbeckError, match=sentence):
        read(tmp_path)


@pytest.mark.parametrize(
    ("kind", "arguments", "sentence"),
    [
        (
            "mixtral",
            {"num_experts": 8},
            "experts.linear_fc1.weight is of 4 experts, and num_experts in its arguments is 8",
        ),
        ("mixtral", {"num_experts": None}, "has no decoder.layers.0.mlp.linear_fc1.weight, which a llama model"),
        (
            "qwen3_moe",
            {"moe_layer_freq": 1},
            "has no decoder.layers.0.mlp.experts.experts.linear_fc1.weight, which a qwen3_",
        ),
        ("llama", {"num_experts": 4}, "has no decoder.layers.0.mlp.experts.experts.linear_fc1.weight, which a mixtral"),
        (
            "nemotron_h",
            {"hybrid_override_pattern": "M-MM"},
            "has no decoder.layers.3.norm.weight, which a nemotron_h model",
        ),
        ("nemotron_h", {"mamba_state_dim": 16}, r"in_proj.weight has the shape \[268, 64\], .* give \[332, 64\]"),
    ],
)
@pytest.mark.parametrize("form", ["torch_dist", "torch"])
def test_arguments_of_experts_and_hybrids_that_do_not_fit_are_one_sentence(kind, form, arguments, sentence, tmp_path):
    write_checkpoint(make(kind), tmp_path, 1, form=form)
    with pytest.raises(LimbeckError, match=sentence):
        read(tmp_path, megatron_arguments=arguments)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"ffn_hidden_size": 128}, r"layers.0.mlp.linear_fc1.weight has the shape \[192, 64\], .* give \[256, 64\]"),
        (
            {"num_layers": 5},
            r"has no decoder.layers.4.input_layernorm.weight, which a qwen2 model with its arguments has",
        ),
        ({"num_layers": 3}, "has a decoder.layers.3.input_layernorm.weight, which .* does not have"),
        ({"add_qkv_bias": False}, "has a decoder.layers.0.self_attention.linear_qkv.bias, which a llama model"),
        ({"qk_layernorm": True, "add_qkv_bias": False}, r"has no decoder.layers.0.self_attention.q_layernorm.weight"),
        ({"vocab_size": 400}, "word_embeddings.weight has 384 rows, and the vocabulary has 400 tokens"),
        ({"rotary_base": "much"}, "rotary_base = much must be a number"),
    ],
)
@pytest.mark.parametrize("write", [write_legacy, lambda model, folder: write_checkpoint(model, folder, 1)])
def test_arguments_that_do_not_fit_the_tensors_are_one_sentence(write, arguments, sentence, tmp_path):
    write(make("qwen2"), tmp_path)
    with pytest.raises(LimbeckError, match=sentence):
        read(tmp_path, megatron_arguments=arguments)


def test_an_output_layer_of_its_own_is_no_copy_of_the_embeddings(tmp_path):
    write_checkpoint(make("llama"), tmp_path, 1)
    with pytest.raises(LimbeckError, match="has an output layer of its own, but untie_embeddings_and_output_weights"):
        read(tmp_path, megatron_arguments={"untie_embeddings_and_output_weights": False})


def test_an_index_runs_no_code(tmp_path):
    index = write_checkpoint(make("llama"), tmp_path, 1) / ".metadata"
    index.write_bytes(pickle.dumps(_Malicious()))
    with pytest.raises(LimbeckError, match=r"it holds a builtins.exec.* do not load it from a source that you do not"):
        read(tmp_path)


def test_missing_and_damaged_parts_are_one_sentence(tmp_path):
    folder = write_checkpoint(make("llama"), tmp_path, 1)
    (part,) = folder.glob("*.distcp")
    whole = part.read_bytes()
    for damaged in (whole[:2000], b"", bytes(len(whole)), b"x" * len(whole)):
        part.write_bytes(damaged)
        with pytest.raises(LimbeckError, match=r"__0_0.distcp is missing or damaged \(\w"):
            read(tmp_path)
    part.unlink()
    with pytest.raises(LimbeckError, match=r"__0_0.distcp is missing or damaged"):
        read(tmp_path)


@needs_megatron
@pytest.mark.processes
@pytest.mark.workers
def test_models_compute_what_they_compute_in_megatron(tmp_path):
    models = {kind: make(kind) for kind in ARCHITECTURES}
    for kind, changes in ARCHITECTURES.items():
        (tmp_path / f"{kind}.json").write_text(json.dumps(SHAPE | changes))
        write_checkpoint(models[kind], tmp_path / f"{kind}-ours-torch_dist", 10)
        if kind not in HYBRID:  # which here have other names than with Transformer Engine, in this format
            write_checkpoint(models[kind], tmp_path / f"{kind}-ours-torch", 10, form="torch", layers="local")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    script = str(Path(__file__).with_name("write_megatron_checkpoints.py"))
    done = subprocess.run([*command, script, str(tmp_path)], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    ids = torch.randint(250, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for kind, model in models.items():
            theirs = torch.load(tmp_path / f"{kind}.logits.pt")
            folders = [path for path in tmp_path.glob(f"{kind}-*") if path.is_dir() and "ours" not in path.name]
            assert len(folders) == {**dict.fromkeys(DENSE, 10), **dict.fromkeys(EXPERTS, 12)}.get(kind, 6)
            for folder in folders:
                torch.testing.assert_close(read(folder)(ids).logits, theirs[..., :300], rtol=0, atol=1e-5)
            loaded = sorted(tmp_path.glob(f"{kind}-ours-*.pt"))
            assert len(loaded) == (1 if kind in HYBRID else 2)
            for path in loaded:
                torch.testing.assert_close(model(ids).logits, torch.load(path)[..., :300], rtol=0, atol=1e-5)
