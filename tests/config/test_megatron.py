"""Megatron-LM's command line: every argument has a meaning, an effect or an error, and the teacher's NeMo file is read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from limbeck.config import LoadedConfig, load_arguments
from limbeck.config.dialects import megatron, megatron_table
from limbeck.config.dialects.megatron_data import read_blend, split_parts
from limbeck.config.schema import DistillConfig, walk_keys
from limbeck.errors import LimbeckError

REPOSITORY = Path(__file__).resolve().parents[2]
REFERENCE = REPOSITORY.parent / "shared" / "references" / "megatron-modelopt-distill.md"
MINIMAL = "--micro-batch-size 2 --train-iters 100 --lr 1e-3 --seq-length 64 --mock-data"
NEW_STUDENT = """--num-layers 4 --hidden-size 64 --num-attention-heads 4 --tokenizer-type NullTokenizer --vocab-size 1000
    --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear"""
KEYS = {path for path, _ in walk_keys(DistillConfig)} | {"student.strategy_args.strategy_config.megatron"}

Run = Callable[..., LoadedConfig]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with a Hugging Face teacher and a Megatron teacher, on a machine without a GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(megatron, "has_gpu", lambda: False)
    for name, file in (
        ("hf", "config.json"),
        ("student", "config.json"),
        ("mcore", "latest_checkpointed_iteration.txt"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
    return tmp_path


def run(text: str, teacher: str = "--export-kd-teacher-load hf", student: str = NEW_STUDENT) -> LoadedConfig:
    return load_arguments(f"{MINIMAL} {student} {teacher} {text}".split(), "megatron")


def at(loaded: LoadedConfig, path: str) -> Any:
    found: Any = loaded.config
    for part in path.split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    return found


def mistakes(text: str, **parts: str) -> list[str]:
    with pytest.raises(LimbeckError) as caught:
        run(text, **parts)
    return str(caught.value).splitlines()


def test_every_argument_says_what_becomes_of_it_and_names_real_keys() -> None:
    kinds = megatron_table.kinds()
    tables = (
        megatron_table.MODEL_VALUES,
        megatron_table.MODEL_SWITCHES,
        megatron_table.MOVED,
        megatron_table.PARALLEL,
        megatron_table.OF_MEGATRON,
        megatron_table.SPECIAL,
        megatron_table.IGNORED,
        megatron_table.ONLY,
    )
    assert len(kinds) == sum(map(len, tables)), "an argument is in two tables"
    for flag in kinds:
        assert megatron_table.meaning(flag), flag
    for key in megatron_table.MOVED.values():
        assert key in KEYS or key == "distillation_config", key
    for name in megatron_table.OF_MEGATRON:
        assert f"student.strategy_args.strategy_config.megatron.{megatron_table.megatron_key(name)}" in KEYS
    for key in megatron_table.PARALLEL.values():
        assert f"student.strategy_args.strategy_config.{key}" in KEYS
    assert megatron_table.SPECIAL_MEANING.keys() == megatron_table.SPECIAL.keys()


def test_the_documentation_has_every_argument_with_its_meaning() -> None:
    text = (REPOSITORY / "docs" / "coming-from-megatron.md").read_text(encoding="utf-8")
    table, refused, ignored = re.split(r"\nErrors, because|\nNo effect, with", text.partition("## Arguments")[2])
    described, _, table = table.partition("| argument |")
    rows = {
        flag: row.split(" | ")[1].strip(" |") for row in table.splitlines() for flag in re.findall(r"`--([\w-]+)`", row)
    }
    of_model = megatron_table.MODEL_VALUES | megatron_table.MODEL_SWITCHES.keys()
    for flag in megatron_table.kinds():
        meaning = megatron_table.meaning(flag)
        if meaning == "refused":
            assert f"`--{flag}`" in refused, flag
        elif flag in of_model or flag in megatron_table.IGNORED:
            assert f"`--{flag}`" in (described if flag in of_model else ignored.partition("\n## ")[0]), flag
        else:
            assert rows[flag] == meaning


@pytest.mark.parametrize("flag", sorted(megatron_table.IGNORED))
def test_an_argument_without_effect_is_in_the_one_notice(folder: Path, flag: str) -> None:
    value = {"switch": "", "value": "1", "values": "1 2"}[megatron_table.IGNORED[flag]]
    (notice,) = [one for one in run(f"--{flag} {value}").notices if "have no effect" in one]
    assert f"--{flag}" in notice


def test_a_flag_may_have_a_value_for_each_layer_or_loss(folder: Path) -> None:
    run("--moe-router-load-balancing-type none aux_loss --moe-aux-loss-coeff 0 0.0")
    (line,) = mistakes("--moe-router-load-balancing-type aux_loss sinkhorn")
    assert line.startswith("--moe-router-load-balancing-type = aux_loss sinkhorn is not supported")
    (line,) = mistakes("--iterations-to-skip 3 4")
    assert line.startswith("--iterations-to-skip = 3 4 is not supported")


@pytest.mark.parametrize("flag", sorted(megatron_table.ONLY))
def test_an_argument_that_would_change_the_result_is_refused(folder: Path, flag: str) -> None:
    kind, allowed, _ = megatron_table.ONLY[flag]
    text = f"--{flag} {'' if kind == 'switch' else '0.5'}"
    needed = [f"--{name}" for name in megatron_table.NEEDED.get(flag, ())]
    for switch in needed or [""]:
        (line,) = mistakes(f"{text} {switch}")
        assert line.startswith(f"--{flag}") and line.endswith(".")
    for value in allowed:
        run(f"--{flag} {value} {''.join(needed[:1])}")
    if needed:
        assert any(f"--{flag}" in notice for notice in run(text).notices if "have no effect" in notice)


@pytest.mark.parametrize(
    "flag", sorted(megatron_table.MOVED.keys() - {"save", "export-kd-cfg", "export-kd-distill-cfg"})
)
def test_a_moved_argument_is_the_origin_of_its_key(folder: Path, flag: str) -> None:
    value = {"data-cache-path": "cache", "wandb-exp-name": "mine"}.get(flag, "0.25" if "adam" in flag else "3")
    text = MINIMAL.replace("--lr 1e-3", "").replace("--seq-length 64", "").replace("--micro-batch-size 2", "")
    required = {"lr": "1e-3", "seq-length": "64", "micro-batch-size": "1"}
    others = " ".join(f"--{name} {given}" for name, given in required.items() if name != flag)
    loaded = load_arguments(
        f"{text} {others} {NEW_STUDENT} --export-kd-teacher-load hf --{flag} {value}".split(), "megatron"
    )
    key = megatron_table.MOVED[flag]
    assert str(at(loaded, key)).removesuffix(".0") == value
    assert loaded.origins[key] == f"--{flag}"


def test_the_whole_command_line_of_a_llama(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "16")
    (folder / "kd.yaml").write_text("skip_lm_loss: false\nkd_loss_scale: 3\nlogit_kl_temperature: 2\n")
    loaded = run(
        """--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --context-parallel-size 2 --sequence-parallel
        --global-batch-size 64 --bf16 --lr-decay-style cosine --lr-decay-iters 90 --lr-warmup-fraction 0.1 --min-lr 1e-4
        --group-query-attention --num-query-groups 2 --rotary-base 500000 --untie-embeddings-and-output-weights
        --export-kd-cfg kd.yaml --export-te-mcore-model --exit-interval 30 --exit-duration-in-mins 230 --save out
        --limbeck-strategy megatron --use-distributed-optimizer --num-layers-per-virtual-pipeline-stage 1
        --recompute-granularity full --recompute-method uniform --recompute-num-layers 1 --attention-dropout 0.0
        --hidden-dropout 0 --tensorboard-dir tb --wandb-project p --wandb-exp-name n seed=7"""
    )
    expected = {
        "seed": 7,
        "student.training_args.per_device_train_batch_size": 2,
        "student.training_args.gradient_accumulation_steps": 16,  # 64 rows / 2 / (16 processes / 8 of a model)
        "max_steps": 30,
        "checkpoint_config.save_before": "03:50",
        "student.training_args.warmup_steps": 9,
        "student.training_args.lr_scheduler_type": "megatron",
        "student.training_args.lr_scheduler_kwargs": {"decay_style": "cosine", "decay_steps": 90, "min_lr": 1e-4},
        "student.model_args.dtype": "bf16",
        "teacher.model_args.dtype": "bf16",
        "student.strategy_args.strategy_name": "megatron_train",
        "teacher.strategy_args.strategy_name": "megatron_infer",
        "student.strategy_args.strategy_config.pipeline_model_parallel_size": 2,
        "teacher.strategy_args.strategy_config.tensor_model_parallel_size": 2,
        "teacher.strategy_args.strategy_config.sequence_parallel": True,
        "student.strategy_args.strategy_config.megatron.virtual_pipeline_model_parallel_size": 2,
        "student.strategy_args.strategy_config.megatron.recompute_granularity": "full",
        "distill_loss_weight": 0.75,
        "kd_temperature": 2.0,
        "temperature_squared": False,
        "loss_balance": "weighted",
        "track_with": ["tensorboard", "wandb"],
        "tracker_kwargs": {"tensorboard": {"log_dir": "tb"}, "wandb": {"project": "p", "name": "n"}},
        "tokenizer": "null:1000",
        "student.model_args.megatron_arguments.rotary_base": 500000,
        "student.model_args.megatron_arguments.add_bias_linear": False,
        "student.model_args.megatron_arguments.untie_embeddings_and_output_weights": True,
    }
    assert {path: at(loaded, path) for path in expected} == expected
    assert loaded.origins["student.model_args.megatron_arguments.rotary_base"] == "--rotary-base"


def test_the_commands_of_the_reference_are_accepted(folder: Path) -> None:
    if not REFERENCE.is_file():
        pytest.skip("needs the reference")
    text = REFERENCE.read_text()
    blocks = [block for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) if "--export-kd" in block]
    arguments = re.sub(r"<[a-z-]+>", "FILE", " ".join(blocks)).split()
    (yaml,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (folder / "kd.yaml").write_text(yaml)
    (folder / "teacher.yaml").write_text("num_layers: 2")
    values = {"--export-kd-teacher-load": "mcore", "--export-kd-distill-cfg": "kd.yaml"}
    values["--export-kd-teacher-model-config"] = "teacher.yaml"
    words = [values.get(arguments[i - 1], word) if word == "FILE" else word for i, word in enumerate(arguments)]
    loaded = run(" ".join(words), teacher="")
    assert at(loaded, "features.logit_layers") == ["output_layer", "output_layer"]
    assert at(loaded, "features.pairs")[1] == ["decoder.final_layernorm", "decoder.layers.30.input_layernorm"]
    assert (at(loaded, "distill_loss_weight"), at(loaded, "teacher.model_args.megatron_arguments.num_layers")) == (1, 2)


def test_without_a_distillation_file_only_the_divergence_of_the_logits_counts(folder: Path) -> None:
    loaded = run("")
    assert (at(loaded, "distill_loss_weight"), at(loaded, "kd_temperature"), at(loaded, "logits_topk")) == (1, 1, 0)
    alone = run("", teacher="")
    assert at(alone, "distill_loss_weight") == 0
    assert any("trained without a teacher" in notice for notice in alone.notices)


NEMO = """
encoder_seq_length: 4096
num_layers: 8
hidden_size: 128
ffn_hidden_size: 256
num_attention_heads: 8
num_query_groups: 4
bias: false
activation: fast-swiglu
normalization: rmsnorm
layernorm_epsilon: 1e-6
position_embedding_type: rope
rotary_base: 1e6
rotary_percentage: 1.0
share_embeddings_and_output_weights: false
make_vocab_size_divisible_by: 64
precision: bf16
tensor_model_parallel_size: 8
tokenizer: {library: huggingface, type: some/model}
"""


def test_the_teachers_nemo_file_becomes_megatrons_arguments(folder: Path) -> None:
    (folder / "mcore" / "model_config.yaml").write_text(NEMO)
    loaded = run("", teacher="--export-kd-teacher-load mcore")
    arguments = dict(at(loaded, "teacher.model_args.megatron_arguments"))
    assert arguments.pop("tokenizer_model") == "null:1000"
    assert arguments == {
        "seq_length": 4096, "num_layers": 8, "hidden_size": 128, "ffn_hidden_size": 256, "num_attention_heads": 8,
        "num_query_groups": 4, "add_bias_linear": False, "swiglu": True, "normalization": "RMSNorm",
        "norm_epsilon": 1e-6, "position_embedding_type": "rope", "rotary_base": 1000000, "rotary_percent": 1.0,
        "untie_embeddings_and_output_weights": True, "make_vocab_size_divisible_by": 64,
    }  # fmt: skip
    assert at(loaded, "teacher.model_args.dtype") == "bf16"
    assert at(loaded, "student.model_args.dtype") == "fp32"


@pytest.mark.parametrize(
    "tokenizer",
    [
        "tokenizer: {library: huggingface, type: some/model}",
        "tokenizer: {type: HuggingFaceTokenizer, model: some/model}",
        "tokenizer_type: HuggingFaceTokenizer\ntokenizer_model: some/model",
    ],
)
def test_the_teachers_own_tokenizer_is_read_or_named(folder: Path, tokenizer: str) -> None:
    (folder / "mcore" / "model_config.yaml").write_text(tokenizer)
    teacher = "--export-kd-teacher-load mcore"
    key = "teacher.model_args.megatron_arguments.tokenizer_model"
    same = run("", teacher=teacher)
    assert at(same, key) == "null:1000"
    assert any("the tokenizer some/model in mcore/model_config.yaml is not read" in notice for notice in same.notices)
    own = run("cross_tokenizer=hybrid", teacher=teacher)
    assert at(own, key) == "some/model" and not any("some/model" in notice for notice in own.notices)


@pytest.mark.parametrize(
    ("dtype", "spellings"),
    [("bf16", "bf16 bf16-mixed bf16-true"), ("fp16", "fp16 16 16-mixed 16-true"), ("fp32", "32 32-true")],
)
def test_the_precisions_of_lightning_are_the_teachers(folder: Path, dtype: str, spellings: str) -> None:
    for precision in spellings.split():
        (folder / "mcore" / "model_config.yaml").write_text(f"precision: {precision}")
        assert at(run("", teacher="--export-kd-teacher-load mcore"), "teacher.model_args.dtype") == dtype


def test_megatrons_own_names_are_known_in_the_teachers_file(folder: Path) -> None:
    lines = "bf16: true\nfp16: false\nposition_embedding_type: null\ndisable_bias_linear: true\nlog_interval: 3"
    (folder / "mcore" / "model_config.yaml").write_text(lines)
    loaded = run("", teacher="--export-kd-teacher-load mcore")
    assert at(loaded, "teacher.model_args.dtype") == "bf16"
    arguments = dict(at(loaded, "teacher.model_args.megatron_arguments"))
    del arguments["tokenizer_model"]
    assert arguments == {"position_embedding_type": "rope", "disable_bias_linear": True}


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("num_layer: 3", "num_layer in {} is not a key of a teacher's model_config.yaml; did you mean num_layers?"),
        ("headscale: true", "headscale = true in {} describes a model that is not supported"),
        ("activation: geglu", 'activation = "geglu" in {} is not a value that Limbeck can translate'),
        ("transformer_block_type: post_ln", "transformer_block_type = post_ln in {} describes a model"),
    ],
)
def test_a_key_of_nemo_that_cannot_be_translated_is_an_error(folder: Path, line: str, sentence: str) -> None:
    file = Path("mcore") / "model_config.yaml"
    file.write_text(line)
    (found,) = mistakes("", teacher="--export-kd-teacher-load mcore")
    assert sentence.format(file) in found


@pytest.mark.parametrize(
    ("text", "parts", "sentence"),
    [
        ("--micro-batch-siz 3", {}, "--micro-batch-siz is not a flag, did you mean --micro-batch-size?"),
        ("--moe-layer-frequency-of-all 3", {}, "--moe-layer-frequency-of-all is not a flag; --help lists"),
        ("--lr", {}, "expected one argument"),
        ("--global-batch-size 3", {}, "--global-batch-size = 3 is not a multiple of --micro-batch-size 2 x 1 data"),
        ("--train-samples 3", {}, "--train-samples and --train-iters are both given; keep one"),
        ("--bf16 --fp16", {}, "--fp16 and --bf16 contradict each other; keep one"),
        (
            "--export-model-type T5Model",
            {},
            "--export-model-type = T5Model is not supported; use GPTModel, MambaModel or HybridModel",
        ),
        ("--limbeck-strategy ddp", {}, "--limbeck-strategy = ddp is not one of megatron, fsdp2"),
        ("--lr-decay-style WSD", {}, "lr_scheduler_kwargs.wsd_decay_steps = 0 must be a whole number of steps above 0"),
        ("--lr-decay-style exp", {}, "decay_style = exp is not one of linear, cosine"),
        (
            "--min-lr 1",
            {},
            "--min-lr: student.training_args.lr_scheduler_kwargs.min_lr = 1 must not be above learning_rate",
        ),
        ("--lr-warmup-init 1", {}, "lr_scheduler_kwargs.warmup_init = 1 must not be above learning_rate = 0.001"),
        ("--lr-warmup-iters 5 --lr-decay-iters 5", {}, "warmup_steps = 5 must be below student.training_args.lr_"),
        ("--num-layers-per-virtual-pipeline-stage 3", {}, "must divide --num-layers, which is 4"),
        (
            "--num-layers-per-virtual-pipeline-stage 3",
            {"student": "--load mcore --use-checkpoint-args --tokenizer-model hf"},
            "must divide --num-layers, which is not known; give it.",
        ),
        ("--make-vocab-size-divisible-by 0", {}, "--make-vocab-size-divisible-by = 0 must be at least 1"),
        ("", {"teacher": "--export-kd-teacher-load nowhere"}, "--export-kd-teacher-load = nowhere has no checkpoint"),
        (
            "--export-kd-teacher-model-config nowhere.yaml",
            {"teacher": "--export-kd-teacher-load mcore"},
            "--export-kd-teacher-model-config nowhere.yaml cannot be read",
        ),
        (
            "--export-kd-teacher-model-config nowhere.yaml",
            {},
            "--export-kd-teacher-model-config = nowhere.yaml is not a file; leave it out",
        ),
        ("--load nowhere", {}, "--load = nowhere has no checkpoint, neither of Megatron-LM nor of Hugging Face"),
        (
            "",
            {"student": "--tokenizer-model hf"},
            "student_pretrain is not set; give --load CHECKPOINT, or --num-layers",
        ),
        ("--tokenizer-type BertWordPieceCase", {}, "--tokenizer-type = BertWordPieceCase is not supported; convert it"),
        ("", {"student": "--load mcore"}, "--tokenizer-model is not given"),
        ("--export-kd-cfg nowhere.yaml", {}, "distillation_config = nowhere.yaml is not a file"),
        (
            "--export-kd-cfg kd.yaml",
            {"teacher": ""},
            "--export-kd-cfg needs --export-kd-teacher-load; give the teacher",
        ),
        (
            "",
            {"teacher": "--export-kd-teacher-load nemo"},
            "--export-kd-teacher-load = nemo has no checkpoint of Megatron",
        ),
        ("--spec local", {}, "--spec = local is not supported: layers of a GPT model need no --spec"),
        (
            "--hybrid-layer-pattern=",
            {},
            "--hybrid-layer-pattern is empty; give a symbol for each layer, or remove it and",
        ),
        (
            "--hybrid-layer-pattern MM-* --hybrid-override-pattern MMMM",
            {},
            "--hybrid-layer-pattern = MM-* contradicts --hybrid-override-pattern = MMMM; keep one of them.",
        ),
        (
            "--hybrid-override-pattern MM-* --hybrid-attention-ratio 0.5 --hybrid-mlp-ratio 0.25",
            {},
            "--hybrid-attention-ratio = 0.5 contradicts --hybrid-override-pattern = MM-*, of whose 4 layers 1 are *; keep",
        ),
    ],
)
def test_a_mistake_is_one_sentence(folder: Path, text: str, parts: dict[str, str], sentence: str) -> None:
    (folder / "kd.yaml").write_text("kd_loss_scale: 10.0")
    (folder / "nemo").mkdir()
    (folder / "nemo" / "model_config.yaml").write_text("num_layers: 4")
    lines = mistakes(text, **parts)
    assert len(lines) == 1 and sentence in lines[0] and lines[0].endswith((".", "?")), lines


def test_the_strategy_follows_the_devices_and_keeps_the_sizes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "--tensor-model-parallel-size 2 --overlap-grad-reduce"
    without = run(text)
    assert at(without, "student.strategy_args.strategy_name") == "fsdp2_train"
    assert at(without, "teacher.strategy_args.strategy_config.tensor_model_parallel_size") == 2
    (notice,) = [one for one in without.notices if "no GPU" in one]
    assert "--overlap-grad-reduce" in notice
    monkeypatch.setattr(megatron, "has_gpu", lambda: True)
    assert at(run(text), "student.strategy_args.strategy_config.megatron.overlap_grad_reduce") is True
    assert at(run(f"{text} --limbeck-strategy fsdp2"), "teacher.strategy_args.strategy_name") == "fsdp2_infer"


def test_a_teacher_that_can_be_divided_like_the_student_is(folder: Path) -> None:
    experts = "--num-experts 4 --expert-model-parallel-size 2 --moe-grouped-gemm --moe-router-dtype fp32"
    stages = "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 1"
    key = "{}.strategy_args.strategy_config.megatron"
    text = f"--limbeck-strategy megatron {experts} {stages}"
    both = {"expert_model_parallel_size": 2, "moe_grouped_gemm": True, "moe_router_dtype": "fp32"}
    first = {"num_layers_in_first_pipeline_stage": 1}

    def taught(content: dict[str, Any], more: str = "") -> tuple[dict[str, Any], list[str]]:
        (folder / "hf" / "config.json").write_text(json.dumps(content))
        loaded = run(f"{text} {more}")
        assert at(loaded, key.format("student")).model_dump(exclude_defaults=True) == both | first
        found = at(loaded, key.format("teacher")).model_dump(exclude_defaults=True)
        return found, [notice for notice in loaded.notices if "of the student only" in notice]

    assert taught({"num_hidden_layers": 8, "num_local_experts": 8}) == (both | first, [])
    assert taught({"num_hidden_layers": 8}) == (first, [])  # without experts
    found, (notice,) = taught({"num_hidden_layers": 1, "num_experts": 8})
    assert found == both and notice.startswith("--decoder-first-pipeline-num-layers: of the student only")
    own = f"{key.format('teacher')}.expert_model_parallel_size=4"
    assert taught({"num_hidden_layers": 8, "num_experts": 8}, own)[0]["expert_model_parallel_size"] == 4
    (folder / "mcore" / "model_config.yaml").write_text("num_layers: 8\nnum_moe_experts: 8")
    nemo = at(run(text, teacher="--export-kd-teacher-load mcore"), key.format("teacher"))
    assert nemo.model_dump(exclude_defaults=True) == both | first
    (folder / "mcore" / "model_config.yaml").unlink()
    (notice,) = [one for one in run(text, teacher="--export-kd-teacher-load mcore").notices if "student only" in one]
    assert "--expert-model-parallel-size" in notice and "--decoder-first" in notice


def test_virtual_stages_are_counted_in_the_layers_of_the_students_folder(folder: Path) -> None:
    (folder / "student" / "config.json").write_text('{"num_hidden_layers": 8}')
    text = "--limbeck-strategy megatron --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"
    loaded = run(f"{text} --use-checkpoint-args", student="--load student")
    assert at(loaded, "student.strategy_args.strategy_config.megatron.virtual_pipeline_model_parallel_size") == 4


def test_layers_of_experts_are_recomputed_and_code_is_run_only_if_chosen(folder: Path) -> None:
    key = "student.strategy_args.strategy_config.megatron.recompute_modules"
    text = "--limbeck-strategy megatron --num-experts 4 --moe-layer-recompute"
    assert at(run(text), key) == ["core_attn", "moe"]
    assert at(run(f"{text} --recompute-granularity selective --recompute-modules mlp"), key) == ["mlp", "moe"]
    for flag in ("--moe-layer-recompute", "--recompute-activations"):
        (line,) = mistakes(f"{flag} --limbeck-strategy megatron --recompute-granularity full")
        assert line.startswith(f"{flag} and --recompute-granularity full contradict each other")
    trusted = [f"{role}.model_args.trust_remote_code" for role in ("student", "teacher")]
    assert [at(run("--trust-remote-code"), key) for key in trusted] == [True, True]
    assert [at(run(""), key) for key in trusted] == [False, False]


def test_overrides_count_among_the_sizes_and_may_give_the_teacher_its_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    stages = "{}.strategy_args.strategy_config.pipeline_model_parallel_size"
    for student in (f"{stages.format('student')}=2", "--pipeline-model-parallel-size 2"):
        loaded = run(f"--global-batch-size 8 {student} {stages.format('teacher')}=1")
        assert at(loaded, "student.training_args.gradient_accumulation_steps") == 4
        assert [at(loaded, stages.format(role)) for role in ("student", "teacher")] == [2, 1]
    (line,) = mistakes(f"--pipeline-model-parallel-size 2 {stages.format('student')}=1")
    assert "contradicts" in line


def test_load_resumes_its_own_run_or_starts_the_student(folder: Path) -> None:
    model, resume = "student.model_args.model_name_or_path", "resume_from_checkpoint"
    started = run("--load student --save out", student="")
    assert (at(started, model), at(started, resume)) == ("student", False)
    new = run("--load out --save out --pretrained-checkpoint student")
    assert (at(new, model), at(new, resume)) == ("student", "latest")
    assert at(run("--load out --save out"), model) is None
    (folder / "out" / "checkpoint-40").mkdir(parents=True)
    (folder / "out" / "student").mkdir()
    (folder / "out" / "student" / "config.json").write_text("{}")  # an older copy, or all that is left
    again = run("--load out --save out --pretrained-checkpoint student --exit-interval 30")
    assert (at(again, model), at(again, resume), at(again, "max_steps")) == ("student", "latest", 60)
    other = run("--load out --save other", student="")
    assert (at(other, model), at(other, resume)) == ("out/student", False)
    elsewhere = "--load out --save out --finetune checkpoint_config.output_dir=new"
    tuned = run(elsewhere, student="")
    assert (at(tuned, model), at(tuned, resume)) == ("out/student", False)
    (folder / "out" / "checkpoint-40" / "config.json").write_text("{}")
    (folder / "out" / "checkpoint-5").mkdir()
    (folder / "out" / "checkpoint-5" / "config.json").write_text("{}")
    for text in ("--load out --save other", elsewhere, "--pretrained-checkpoint out"):
        assert at(run(text, student=""), model) == "out/checkpoint-40"
    early = run("--load out --ckpt-step 40 --save other", student="")
    assert at(early, model) == "out/checkpoint-40"
    assert (
        "--ckpt-step = 7 has no checkpoint in out" in mistakes("--load out --ckpt-step 7 --save other", student="")[0]
    )
    taught = run("", teacher="--export-kd-teacher-load out")
    assert at(taught, "teacher.model_args.model_name_or_path") == "out/checkpoint-40"
    for step in (4, 12):
        (folder / "mcore" / f"iter_{step:07d}").mkdir()
    of_step = run("--load mcore --ckpt-step 12 --tokenizer-model hf", student="")
    assert at(of_step, model) == "mcore/iter_0000012"
    (line,) = mistakes("--load mcore --ckpt-step 99 --tokenizer-model hf", student="")
    assert "--ckpt-step = 99 has no checkpoint in mcore, which has 4, 12; give one of these, or remove it" in line
    _checkpoint(folder / "out" / "checkpoint-9")
    earlier = run("--load ./out/ --save out --ckpt-step 9 --exit-interval 30")
    assert (at(earlier, resume), at(earlier, "max_steps")) == ("out/checkpoint-9", 30)
    assert earlier.origins[resume] == "--ckpt-step"
    (line,) = mistakes("--load out --save out --ckpt-step 7")
    assert "--ckpt-step = 7 has no checkpoint in out" in line


def test_an_interrupted_run_is_a_start_or_a_teacher_from_its_newest_checkpoint(folder: Path) -> None:
    for step in (9, 10):
        _checkpoint(folder / "out" / f"checkpoint-{step}")
    model = "student.model_args.model_name_or_path"
    assert at(run("--load out --save other", student=""), model) == "out/checkpoint-10"
    taught = run("", teacher="--export-kd-teacher-load out")
    assert at(taught, "teacher.model_args.model_name_or_path") == "out/checkpoint-10"
    assert at(run("--load out --save other --ckpt-step 9", student=""), model) == "out/checkpoint-9"


@pytest.mark.parametrize("flag", sorted(megatron_table.OF_RESUMED))
def test_a_flag_about_a_resumed_checkpoint_is_an_error_when_there_is_one(folder: Path, flag: str) -> None:
    _checkpoint(folder / "out" / "checkpoint-9")
    for text in ("--load out --save out", "--save other resume_from_checkpoint=out/checkpoint-9"):
        (line,) = mistakes(f"{text} --{flag}")
        assert line.startswith(f"--{flag} ") and "out/checkpoint-9" in line and f"remove --{flag}, " in line
    for text in ("--load new --save new", "--load out --save other --finetune", "--load mcore"):
        assert any(f"--{flag}" in notice for notice in run(f"{text} --{flag}").notices if "have no effect" in notice)


def test_a_missing_checkpoint_ends_the_run_if_it_shall(folder: Path) -> None:
    text = "--load out --save out --exit-on-missing-checkpoint"
    for more in ("", "student_pretrain=student"):
        (line,) = mistakes(f"{text} {more}")
        assert line.startswith("--load = out has no checkpoint; check the path")
    run(f"{text} --pretrained-checkpoint student")
    _checkpoint(folder / "out" / "checkpoint-9")
    assert at(run(text), "resume_from_checkpoint") == "latest"


@pytest.mark.parametrize(("strategy", "window", "hysteresis"), [("megatron", 1000, 2), ("fsdp2", 2000, 1)])
def test_the_scale_of_the_loss_changes_as_the_strategy_does_it(
    folder: Path, strategy: str, window: int, hysteresis: int
) -> None:
    text = f"--limbeck-strategy {strategy} --fp16"
    run(f"{text} --loss-scale-window {window} --hysteresis {hysteresis}")
    lines = mistakes(f"{text} --loss-scale-window {window + 1} --hysteresis {hysteresis + 1}")
    assert all(
        f"with the strategy {strategy} it is {n};" in x for n, x in zip((window, hysteresis), lines, strict=True)
    )
    (notice,) = [one for one in run("--hysteresis 7").notices if "have no effect" in one]
    assert "--hysteresis" in notice


def test_gradients_are_reduced_in_the_chosen_precision(folder: Path) -> None:
    key = "student.strategy_args.strategy_config.reduce_dtype"
    assert [at(run(f"--grad-reduce-in-bf16 {text}"), key) for text in ("--bf16", "")] == ["bf16", "fp32"]


HYBRID = """--hidden-size 64 --num-attention-heads 4 --tokenizer-type NullTokenizer --vocab-size 1000"""
SPEC = "--spec megatron.core.models.mamba.mamba_layer_specs mamba_stack_spec"


@pytest.mark.parametrize(
    ("text", "hybrid"),
    [
        ("--num-layers 4", None),
        ("--num-layers 4 --export-model-type MambaModel", True),
        ("--yaml-cfg args.yaml --export-model-type HybridModel", True),
        (f"--num-layers 4 {SPEC}", True),
        ("--hybrid-layer-pattern MM-* --export-model-type MambaModel", True),  # which has the number of layers
        ("--hybrid-override-pattern MM-*", None),  # a hybrid by its pattern
    ],
)
def test_the_type_of_the_model_or_megatrons_own_layers_make_it_a_hybrid(
    folder: Path, text: str, hybrid: bool | None
) -> None:
    (folder / "args.yaml").write_text("num_layers: 4")
    arguments = at(run(text, student=HYBRID), "student.model_args.megatron_arguments")
    assert arguments.get("is_hybrid_model") is hybrid


@pytest.mark.parametrize("text", ["", "--load student", "--load out --finetune"])
def test_a_folder_of_an_earlier_run_is_resumed_with_load_or_left_alone(folder: Path, text: str) -> None:
    _checkpoint(folder / "out" / "checkpoint-9")
    (line,) = mistakes(f"--save out {text}")
    assert line.startswith(
        "--save = out has checkpoints of an earlier run; give --load out without --finetune to go on"
    )
    run(f"--save out {text} checkpoint_config.output_dir=other")
    run("--save out --load out")


def test_how_to_go_on_after_a_limit_is_in_the_words_of_the_command_line(folder: Path) -> None:
    end = (
        "Stopped by checkpoint_config.save_before = 00:01 after step 1; resume_from_checkpoint=true goes on from there."
    )
    found = run("--save out --exit-duration-in-mins 1").with_origin(end)
    assert "checkpoint_config.save_before (--exit-duration-in-mins) = 00:01" in found
    assert found.endswith("; --load out goes on from there.")
    assert run("").with_origin(end).endswith("; --load ./output --save ./output goes on from there.")


def test_boundaries_of_stages_in_a_pattern_are_named_as_without_effect(folder: Path) -> None:
    (notice,) = [
        one for one in run("--hybrid-layer-pattern MM|-* --hybrid-override-pattern MM-*").notices if "|" in one
    ]
    assert notice.startswith("the | in --hybrid-layer-pattern have no effect")


def _checkpoint(path: Path) -> None:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")


def test_what_is_saved_is_also_a_checkpoint_of_megatron(folder: Path) -> None:
    megatron_too, form = "checkpoint_config.save_megatron", "checkpoint_config.megatron_format"
    saved = run("--save out --ckpt-format torch")
    assert (at(saved, megatron_too), at(saved, form), at(run(""), megatron_too)) == (True, "torch", False)
    divided = run("--save out --ckpt-format torch --tensor-model-parallel-size 2 checkpoint_config.save_megatron=true")
    assert at(divided, form) == "torch_dist"
    assert any("--ckpt-format torch: the student is saved as torch_dist" in notice for notice in divided.notices)
    off = run("--save out --ckpt-format torch checkpoint_config.save_megatron=false")
    assert (at(off, megatron_too), at(off, form)) == (False, "torch_dist")


def test_corpora_are_blended_and_split_by_documents(folder: Path) -> None:
    text = MINIMAL.replace("--mock-data", "")

    def sources(arguments: str) -> tuple[Any, Any]:
        loaded = load_arguments(f"{text} {NEW_STUDENT} --export-kd-teacher-load hf {arguments}".split(), "megatron")
        train = at(loaded, "student.data_args.sources")
        return train, loaded.config.validation and loaded.config.validation.data_args.sources

    train, valid = sources("--data-path 0.3 a 0.7 b --split 949,50,1 --eval-iters 10 --global-batch-size 4")
    assert train == [
        {"path": "a", "concatenate": True, "documents": [0.0, 0.949], "weight": 0.3},
        {"path": "b", "concatenate": True, "documents": [0.0, 0.949], "weight": 0.7},
    ]
    assert [(one["path"], one["documents"], one["max_samples"]) for one in valid] == [
        ("a", [0.949, 0.999], 12),
        ("b", [0.949, 0.999], 28),
    ]
    train, valid = sources("--data-path a")  # Megatron's default of --split
    assert [one["documents"] for one in (*train, *valid)] == [[0.0, 0.969], [0.969, 0.999]]
    assert sources("--data-path a --split 1,0,0") == ([{"path": "a", "concatenate": True}], None)
    train, valid = sources("--train-data-path a b --valid-data-path c --eval-iters 1")
    assert (len(train), valid) == (2, [{"path": "c", "concatenate": True, "max_samples": 2}])
    (folder / "split.json").write_text(json.dumps({"train": ["2", "a", "3", "b"], "valid": ["c"]}))
    train, valid = sources("--per-split-data-args-path split.json --full-validation")
    assert ([one["weight"] for one in train], valid) == ([2.0, 3.0], [{"path": "c", "concatenate": True}])
    assert sources("student.data_args.file_name=rows.jsonl")[0] is None
    for arguments, sentence in (
        ("", "student.data_args.file_name is not set; give --data-path CORPUS, --mock-data"),
        ("--data-path a --split x", "--split = x must be the shares"),
        ("--data-path a --split 0,1", "leaves no documents for training"),
        ("--data-path 1 a b c --split 1", "--data-path = 1 a b c must be paths, or a weight before each path"),
        ("--train-data-path a --split 1", "cannot be combined with --data-path or --split"),
    ):
        with pytest.raises(LimbeckError, match=re.escape(sentence)) as caught:
            sources(arguments)
        assert len(str(caught.value).splitlines()) == 1


def test_shares_and_blends_are_read_as_megatron_reads_them() -> None:
    assert split_parts("969, 30, 1") == [(0.0, 0.969), (0.969, 0.999), (0.999, 1.0)]
    assert split_parts("90,10") == [(0.0, 0.9), (0.9, 1.0), None]
    assert split_parts("0,0") is None and split_parts("1,2,3,4") is None
    assert read_blend(["a", "b"]) == [(None, "a"), (None, "b")]
    assert read_blend(["30", "a", "70", "b"]) == [(30.0, "a"), (70.0, "b")]
    assert read_blend(["3"]) == [(None, "3")]
