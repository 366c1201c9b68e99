from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from limbeck.config import LoadedConfig, load_config, render_config
from limbeck.config.dialects.roll import DIALECT
from limbeck.config.dialects.roll_table import ONLY_WHEN_OFF
from limbeck.config.translation import SECTIONS
from limbeck.errors import LimbeckError

Load = Callable[..., LoadedConfig]
Mistakes = Callable[..., list[str]]

IN_THE_WILD = """
hydra:
  run:
    dir: .
  output_subdir: null

exp_name: "distill_wild"
seed: 42
logging_dir: ./output/${exp_name}/logs
output_dir: ./output
rpc_timeout: 7200
system_envs:
  RAY_PROFILING: 0
checkpoint_config:
  type: file_system
  output_dir: /data/ckpt
  async_upload: true
track_with: tensorboard
tracker_kwargs: ~
num_gpus_per_node: 8
max_steps: -1
save_steps: 100
resume_from_checkpoint: false
rollout_batch_size: 64
is_offload_states: true
pretrain: Qwen/Qwen2.5
student_pretrain: ${pretrain}-7B
teacher_pretrain: ${pretrain}-14B
logits_topk: 64
distill_loss_weight: 0.85
kd_objective: reverse_kl
logits_transfer_backend: "nccl_only"
prompt_length: 512
response_length: 1536
max_grad_norm: 1.0
question_key: question_zh
answer_key: answer_zh
student:
  model_args:
    attn_implementation: fa2
    disable_gradient_checkpointing: false
    dtype: bfloat16
    model_type: ~
  training_args:
    learning_rate: 2e-5
    lr_scheduler_type: constant
    per_device_train_batch_size: 8
    gradient_accumulation_steps: 4
    warmup_steps: 0
    num_train_epochs: 1
    max_grad_norm: 1.0
    bf16: true
  data_args:
    template: qwen3_nothink
    dataset_dir: data
    file_name:
      - train.json
      - /abs/more.json
    preprocessing_num_workers: 16
  strategy_args:
    strategy_name: fsdp2_train
    strategy_config:
      fsdp_size: 1
      param_dtype: bfloat16
      reduce_dtype: float32
      offload_policy: false
      tp_size: 1
      wrap_policy: {wrap_embeddings: false}
  use_sequence_packing: True
  apply_loss_scale: true
  router_replay: {mode: disable}
  worker_cls: roll.pipeline.distill.distill_worker.StudentWorker
  device_mapping: list(range(0,8))
teacher:
  model_args:
    attn_implementation: fa2
    disable_gradient_checkpointing: true
    dtype: bf16
  data_args:
    template: qwen2_5
  training_args:
    per_device_train_batch_size: 8
  generating_args: ~
  strategy_args:
    strategy_name: hf_infer
    strategy_config: ~
  use_sequence_packing: True
  device_mapping: list(range(0,8))
validation:
  data_args:
    template: qwen2_5
    file_name:
      - valid.json
  infer_batch_size: 4
"""


def test_a_configuration_for_roll_loads_unchanged(load: Load) -> None:
    loaded = load(yaml=IN_THE_WILD)
    config, student = loaded.config, loaded.config.student
    assert config.student_pretrain == "Qwen/Qwen2.5-7B"
    assert config.sequence_length == 2048
    assert config.max_steps is None
    assert config.logging_dir == "./output/distill_wild/logs"
    assert config.environment == {"RAY_PROFILING": "0"}
    assert config.device_mapping == list(range(8))
    assert [one.path for one in config.validation_sources] == [["valid.json"]]
    assert student.model_args.dtype == "bf16"
    assert student.model_args.attn_implementation == "flash_attention_2"
    assert student.strategy_args.strategy_config.fsdp_size is None
    assert student.strategy_args.strategy_config.param_dtype == "bf16"
    assert student.strategy_args.strategy_config.reduce_dtype == "fp32"
    assert student.data_args.template == "qwen3"
    assert student.data_args.template_kwargs == {"enable_thinking": False}
    assert student.data_args.file_name == ["data/train.json", "/abs/more.json"]


def test_the_tag_column_names_the_domains_where_domains_are_mixed(load: Load) -> None:
    mixed = """
    student_pretrain: small
    teacher_pretrain: large
    student:
      data_args: {file_name: a.json, preprocessing_num_workers: 16, tag: kind, domain_interleave_probs: {math: 0.6, code: 0.4}}
    """
    data = load(yaml=mixed).config.student.data_args
    assert (data.domain_key, data.preprocessing_num_workers) == ("kind", 16)
    assert data.domain_interleave_probs == {"math": 0.6, "code": 0.4}
    assert (
        load(yaml=mixed.replace("domain_interleave_probs", "template_kwargs")).config.student.data_args.domain_key
        is None
    )


def test_ignored_keys_are_listed_in_one_notice_with_their_lines(load: Load) -> None:
    loaded = load(yaml=IN_THE_WILD)
    notice, other = loaded.notices
    assert "logits_transfer_backend has no effect" in other and loaded.config.offloads_colocated
    for path in (
        "rpc_timeout",
        "rollout_batch_size",
        "checkpoint_config.async_upload",
        "teacher.training_args.per_device_train_batch_size",
        "teacher.data_args.template",
        "teacher.use_sequence_packing",
        "teacher.model_args.disable_gradient_checkpointing",
        "validation.infer_batch_size",
        "validation.data_args.template",
    ):
        assert f"{path} (" in notice
    assert "rpc_timeout (" in notice and "run.yaml:10)" in notice
    assert "exp_name" not in notice and "worker_cls" not in notice


def test_a_moved_key_has_the_original_key_as_its_origin(load: Load) -> None:
    yaml = IN_THE_WILD.replace("max_grad_norm: 1.0\nquestion", "question")
    origins = load("student.training_args.max_grad_norm=0.5", yaml=yaml).origins
    assert origins["max_grad_norm"] == "derived from student.training_args.max_grad_norm (command line)"
    assert origins["sequence_length"] == "derived from prompt_length + response_length"


def test_the_error_for_a_strategy_that_only_roll_has_names_a_supported_one(mistakes: Mistakes) -> None:
    path = "teacher.strategy_args.strategy_name"
    (line,) = mistakes(f"{path}=sglang")
    assert f"{path} = sglang is not supported yet; use fsdp2_infer or hf_infer" in line


MEGATRON = "student.strategy_args.strategy_config"


def test_megatron_reads_the_keys_that_other_strategies_ignore(load: Load) -> None:
    keys = {
        "virtual_pipeline_model_parallel_size": 2,
        "use_distributed_optimizer": True,
        "recompute_granularity": "selective",
        "recompute_num_layers": 2,
        "ddp_bucket_size": 1000,
    }
    settings = [f"{MEGATRON}.{key}={value}" for key, value in keys.items()]
    loaded = load(
        "student.strategy_args.strategy_name=megatron_train", f"{MEGATRON}.overlap_param_gather=true", *settings
    )
    given = loaded.config.student.strategy_args.strategy_config.megatron
    assert {key: getattr(given, key) for key in keys} == keys
    (ignored,) = [notice for notice in loaded.notices if f"{MEGATRON}.overlap_param_gather" in notice]
    assert f"{MEGATRON}.use_distributed_optimizer" not in ignored


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_rolls_own_defaults_of_megatron_are_accepted(load: Load, mistakes: Mistakes, role: str) -> None:
    sizes = [f"{kind}_parallel_size" for kind in ("tensor_model", "context", "pipeline_model")]
    config = f"{role}.strategy_args.strategy_config"
    loaded = load(*(f"{config}.{key}=null" for key in sizes), f"{config}.save_merged_model=false")
    given = getattr(loaded.config, role).strategy_args.strategy_config
    assert [getattr(given, key) for key in sizes] == [1, 1, 1]
    assert any(f"{config}.save_merged_model" in notice for notice in loaded.notices if "no effect" in notice)
    adapters = "student.model_args.lora_target=all-linear"
    (line,) = mistakes("student.strategy_args.strategy_config.save_merged_model=false", adapters)
    assert "save_merged_model = false with LoRA is not supported" in line


@pytest.mark.parametrize(
    ("settings", "unread"),
    [
        (["recompute_modules=[mlp]"], "recompute_modules has no effect: it is only read with recompute_granularity"),
        (["recompute_granularity=full", "recompute_modules=[mlp]"], "recompute_modules has no effect"),
        (["recompute_granularity=selective", "recompute_method=block"], "recompute_method has no effect"),
        (["recompute_granularity=selective", "recompute_num_layers=2"], "recompute_num_layers has no effect"),
        (["recompute_num_layers=2"], "recompute_num_layers has no effect"),
        (["recompute_granularity=full", "recompute_method=block", "recompute_num_layers=2"], None),
    ],
)
def test_keys_of_recomputation_without_effect_cause_a_notice(
    load: Load, settings: list[str], unread: str | None
) -> None:
    def notices(role: str, mode: str, *more: str) -> list[str]:
        path = f"{role}.strategy_args"
        keys = [f"{path}.strategy_config.{setting}" for setting in settings]
        loaded = load(f"{path}.strategy_name=megatron_{mode}", *keys, *more)
        return [notice for notice in loaded.notices if "megatron.recompute" in notice]

    kept = notices("student", "train", "student.model_args.disable_gradient_checkpointing=true")
    assert len(kept) == (unread is not None) and all(unread in notice for notice in kept if unread)
    assert len(notices("teacher", "infer")) == len(settings)
    if settings == ["recompute_num_layers=2"]:  # which full recomputation reads without recompute_granularity
        assert notices("student", "train", "student.model_args.disable_gradient_checkpointing=false") == []


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            ["strategy_name=megatron_train", "strategy_config.recompute_modules=[]"],
            "command line: student.strategy_args.strategy_config.recompute_modules = [] is empty; remove it",
        ),
        (
            ["strategy_name=megatron_train", "strategy_config.moe_token_dispatcher_type=flex"],
            "command line: student.strategy_args.strategy_config.moe_token_dispatcher_type = flex is not one of",
        ),
        (
            ["strategy_name=megatron_train", "strategy_config.recompute_modules=[foo]"],
            "command line: student.strategy_args.strategy_config.recompute_modules[0] = foo is not one of",
        ),
        (
            ["strategy_name=megatron_train", "strategy_config.fsdp_size=2"],
            "fsdp_size is not read by megatron_train; remove it",
        ),
        (["strategy_name=megatron_train", "strategy_config.fp8=true"], "fp8 = true is not supported yet; remove it"),
        *(
            (
                ["strategy_name=megatron_train", f"strategy_config.recompute_modules=[{module}]"],
                f"has {module}, which {why}",
            )
            for module, why in (
                (
                    "moe_act",
                    "is an activation inside of Megatron's own experts, in place of which Limbeck's are used; use moe",
                ),
                ("shared_experts", "are not recomputed alone; use moe"),
                ("mla_up_proj", "belongs to multi-latent attention, which is not built for megatron; remove it"),
            )
        ),
        (
            ["strategy_name=megatron_train", "strategy_config.recompute_granularity=all"],
            "= all is not one of full, selective",
        ),
        (["strategy_config.virtual_pipeline_model_parallel_size=2"], "= 2 is not supported yet; remove it"),
        (
            ["strategy_config.megatron.recompute_num_layers=2"],
            "is only read by strategy_name: megatron_train; set that",
        ),
    ],
)
def test_a_key_that_a_strategy_does_not_take_is_an_error(
    mistakes: Mistakes, settings: list[str], sentence: str
) -> None:
    (line,) = mistakes(*(f"student.strategy_args.{setting}" for setting in settings))
    assert sentence in line


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("strategy_args.tp_size", "tensor_model_parallel_size"),
        ("strategy_args.strategy_config.tensor_parallel_size", "tensor_model_parallel_size"),
        ("strategy_args.strategy_config.cp_size", "context_parallel_size"),
        ("model_args.ulysses_size", "context_parallel_size"),
        ("strategy_args.pp_size", "pipeline_model_parallel_size"),
        ("strategy_args.strategy_config.pipeline_parallel_size", "pipeline_model_parallel_size"),
    ],
)
def test_all_names_of_a_parallel_size_are_accepted(load: Load, role: str, key: str, ours: str) -> None:
    config = load(f"{role}.{key}=2").config
    assert getattr(getattr(config, role).strategy_args.strategy_config, ours) == 2


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_an_inference_engine_as_teacher_is_an_error(mistakes: Mistakes, engine: str) -> None:
    (line,) = mistakes(f"teacher.strategy_args.strategy_name={engine}")
    assert "is not supported yet; use fsdp2_infer or hf_infer" in line


@pytest.mark.parametrize("key", sorted(ONLY_WHEN_OFF["strategy_config"]))
def test_a_setting_that_would_change_a_result_is_an_error(mistakes: Mistakes, key: str) -> None:
    (line,) = mistakes(f"student.strategy_args.strategy_config.{key}=7")
    assert line.startswith(f"command line: student.strategy_args.strategy_config.{key} = 7 ")


@pytest.mark.parametrize(
    ("kind", "key", "off"), [(kind, key, off) for kind, keys in ONLY_WHEN_OFF.items() for key, (off, _) in keys.items()]
)
def test_a_disabled_setting_is_accepted(kind: str, key: str, off: tuple[object, ...]) -> None:
    for value in off:
        values: dict[str, object] = {key: value}
        for part in reversed(SECTIONS[kind][0].split(".") if SECTIONS[kind][0] else []):
            values = {part: values}
        assert DIALECT.translate(values, {}).contradictions == []


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("student.router_replay.mode=R3", "student.router_replay = {'mode': 'R3'} is not supported yet"),
        (
            "student.mtp_training_mode=joint",
            "student.mtp_training_mode = joint (multi-token prediction) is not supported",
        ),
        ("student.apply_loss_scale=false", "student.apply_loss_scale = false would average"),
        ("student.worker_cls=my.Worker", "student.worker_cls = my.Worker is a worker class of your own"),
        ("student.model_args.model_type=trl", "student.model_args.model_type = trl is not supported"),
        ("student.strategy_args.ep_size=2", "student.strategy_args.ep_size = 2 is not supported yet"),
        (
            "student.training_args.fp16=true",
            "student.training_args.fp16 = true contradicts student.model_args.dtype = bf16",
        ),
        ("student.training_args.seed=1", "student.training_args.seed = 1 contradicts seed = 42"),
        ("model_download_type=MODELSCOPE", "model_download_type = MODELSCOPE is not supported yet"),
        ("checkpoint_config.type=oss", "checkpoint_config.type = oss is not supported yet; use file_system"),
        ("response_length=long", "response_length = long and prompt_length = 1024 must be whole numbers"),
    ],
)
def test_an_unsupported_setting_is_an_error(mistakes: Mistakes, override: str, sentence: str) -> None:
    (line,) = mistakes(override)
    assert line.startswith(f"command line: {sentence}")


def test_a_key_given_in_both_places_must_agree(mistakes: Mistakes, load: Load) -> None:
    assert load("max_grad_norm=2", "student.training_args.max_grad_norm=2").config.max_grad_norm == 2
    (line,) = mistakes("max_grad_norm=2", "student.training_args.max_grad_norm=3")
    assert "student.training_args.max_grad_norm = 3 contradicts max_grad_norm = 2" in line


def test_a_typo_in_an_ignored_section_is_an_error(mistakes: Mistakes) -> None:
    (line,) = mistakes("teacher.training_args.per_device_batch=3")
    assert "did you mean per_device_train_batch_size, a key of student.training_args?" in line


def test_a_temperature_that_roll_multiplies_causes_a_notice(load: Load) -> None:
    temperatures = ["kd_temperature=2", "teacher_temperature=1", "logits_topk=64"]
    (notice,) = load(*temperatures, dialect="roll").notices
    assert "temperature_convention: roll" in notice
    assert load(*temperatures, "temperature_convention=roll", dialect="roll").notices == []


BLOCK = """
    deepspeed_zero3:
      train_micro_batch_size_per_gpu: auto
      gradient_clipping: auto
      bf16: {{enabled: auto}}
      zero_optimization: {{stage: {stage}, overlap_comm: true, stage3_max_live_parameters: 1e9, reduce_bucket_size: auto}}
    student_pretrain: s
    teacher_pretrain: t
    student:
      data_args: {{file_name: d}}
      strategy_args:
        strategy_name: deepspeed_train
        strategy_config: ${{deepspeed_zero3}}
    teacher:
      strategy_args:
        strategy_name: deepspeed_infer
        strategy_config: ${{deepspeed_zero3}}
"""


@pytest.mark.parametrize(("stage", "teacher"), [(1, "hf_infer"), (2, "hf_infer"), (3, "deepspeed_infer")])
def test_a_zero_block_is_passed_on_without_the_values_of_other_keys(
    load: Load, tmp_path: Path, stage: int, teacher: str
) -> None:
    loaded = load(yaml=BLOCK.format(stage=stage))
    made = loaded.config.student.strategy_args
    assert made.strategy_name == "deepspeed_train"
    assert made.strategy_config.deepspeed == {
        "zero_optimization": {"stage": stage, "overlap_comm": True, "stage3_max_live_parameters": 1e9}
    }
    place = "student.strategy_args.strategy_config (run.yaml:12)"
    assert loaded.origins["student.strategy_args.strategy_config.deepspeed.zero_optimization.stage"] == (
        f"derived from {place}"
    )
    assert loaded.config.teacher.strategy_args.strategy_name == teacher
    assert bool(loaded.notices) == (stage < 3)  # of the teacher, which such a stage keeps whole
    # What `limbeck config` shows is the same configuration again.
    again = tmp_path / "again.yaml"
    again.write_text(render_config(loaded))
    assert load_config(again).config == loaded.config


def test_zero_stage_0_is_a_copy_on_every_rank_and_needs_no_deepspeed(load: Load) -> None:
    loaded = load(yaml=BLOCK.format(stage=0))
    made = loaded.config.student.strategy_args
    assert (made.strategy_name, made.strategy_config.replicate) == ("fsdp2_train", True)
    assert any("deepspeed_train with ZeRO stage 0 keeps a whole copy" in notice for notice in loaded.notices)


@pytest.mark.parametrize(
    ("block", "sentence"),
    [
        ("{zero_optimization: {stage: 4}}", "stage = 4 is not a ZeRO stage; use 0, 1, 2 or 3"),
        (
            "{zero_optimization: {stage: 3, zero_quantized_weights: true}}",
            "zero_quantized_weights is not among the keys",
        ),
        ("{zero_optimization: {stage: 2, offload_param: {device: cpu}}}", "offload_param = cpu needs ZeRO stage 3"),
        ("{zero_optimization: {stage: 3, offload_param: {device: disk}}}", "= disk is not an offload device"),
        ("{zero_optimization: {stage: 3, offload_param: {device: nvme}}}", "offload_param = nvme needs nvme_path"),
        ("{zero_optimization: 3}", "zero_optimization = 3 must be a section"),
        ("{fp16: {enabled: true}}", "fp16.enabled = true contradicts model_args.dtype = bf16"),
        ("{bf16: {enabled: false}}", "bf16.enabled = false contradicts model_args.dtype = bf16"),
        ("{train_micro_batch_size_per_gpu: 4}", "is student.training_args.per_device_train_batch_size in Limbeck"),
        ("{gradient_clipping: 1.0}", "gradient_clipping = 1.0 is max_grad_norm in Limbeck"),
        ("{optimizer: {type: Adam}}", "is AdamW with student.training_args.learning_rate"),
        ("{scheduler: {type: WarmupLR}}", "is student.training_args.lr_scheduler_type"),
        ("{deepspeed: {elasticity: {}}}", "strategy_config.deepspeed.elasticity is not among the keys"),
        ("{zero_optimization: {stage: 3}, fsdp_size: 2}", "fsdp_size is not read by deepspeed_train"),
    ],
)
def test_an_unsupported_deepspeed_setting_is_an_error(mistakes: Mistakes, block: str, sentence: str) -> None:
    name = "student.strategy_args.strategy_name=deepspeed_train"
    (line,) = mistakes(name, f"student.strategy_args.strategy_config={block}")
    assert sentence in line


def test_a_deepspeed_block_needs_deepspeed(mistakes: Mistakes) -> None:
    (line,) = mistakes("student.strategy_args.strategy_config={deepspeed: {zero_optimization: {stage: 3}}}")
    assert "strategy_config.deepspeed is only read by strategy_name: deepspeed_train" in line
    (line,) = mistakes("teacher.strategy_args.strategy_name=deepspeed_train")
    assert "is not a strategy for the teacher, whose strategies end in _infer; use fsdp2_infer" in line


def test_concurrent_requests_to_a_worker_are_an_error(load: Load) -> None:
    changed = IN_THE_WILD.replace("  router_replay:", "  max_concurrency: 4\n  router_replay:")
    with pytest.raises(
        LimbeckError, match=r"run.yaml:\d+: student.max_concurrency = 4 is not supported: a worker processes"
    ):
        load(yaml=changed)
