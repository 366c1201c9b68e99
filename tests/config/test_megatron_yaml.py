"""Megatron-LM's YAML files of arguments, and its tokenizers, mean what the same flags mean."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from limbeck.config import load_arguments
from limbeck.config.dialects import megatron, megatron_table, megatron_yaml
from limbeck.errors import LimbeckError
from limbeck.models.megatron_pattern import layer_pattern

FILE = """
language_model:
  num_layers: 4
  hidden_size: 64
  num_attention_heads: 4
  num_query_groups: null
  layernorm_epsilon: 1.e-6
  add_bias_linear: False
  gated_linear_unit: False
  activation_func: swiglu
  num_moe_experts: null
  normalization: RMSNorm
  hidden_dropout: 0.0
  moe_grouped_gemm: False
  bias_swiglu_fusion: False
model_parallel:
  tensor_model_parallel_size: 2
  virtual_pipeline_model_parallel_size: null
  sequence_parallel: True
  bf16: True
  cpu_offloading: False
micro_batch_size: 2
position_embedding_type: rope
swiglu: True
seq_length: 64
lr: 2.5e-4
train_iters: 100
vocab_extra_ids: 0
tokenizer_type: NullTokenizer
vocab_size: 1000
wandb_project: ''
data_path: 0.3 a 0.7 ${CORPUS}
split: '99,1,0'
"""
FLAGS = """--num-layers 4 --hidden-size 64 --num-attention-heads 4 --norm-epsilon 1e-6 --disable-bias-linear --swiglu
    --normalization RMSNorm --hidden-dropout 0 --tensor-model-parallel-size 2 --sequence-parallel --bf16
    --micro-batch-size 2 --position-embedding-type rope --seq-length 64 --lr 2.5e-4 --train-iters 100
    --tokenizer-type NullTokenizer --vocab-size 1000 --data-path 0.3 a 0.7 b --split 99,1,0"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, on a machine without a GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("CORPUS", "b")
    monkeypatch.setattr(megatron, "has_gpu", lambda: False)
    (tmp_path / "args.yaml").write_text(FILE)
    return tmp_path


def mistakes(text: str) -> list[str]:
    with pytest.raises(LimbeckError) as caught:
        load_arguments(text.split())
    return str(caught.value).splitlines()


def test_a_file_of_arguments_gives_what_its_flags_give(folder: Path) -> None:
    of_file, of_flags = load_arguments(["--yaml-cfg", "args.yaml"]), load_arguments(FLAGS.split())
    assert of_file.config == of_flags.config
    assert of_file.origins["student.training_args.learning_rate"].endswith("args.yaml:26)")
    replaced = load_arguments(["--yaml-cfg", "args.yaml", "--lr", "1e-3", "seed=3"])
    assert (replaced.config.student.training_args.learning_rate, replaced.config.seed) == (1e-3, 3)


def test_a_list_of_the_file_is_the_pattern_of_layers_that_the_flag_has(folder: Path) -> None:
    with (folder / "args.yaml").open("a") as file:
        file.write("moe_layer_freq: [0, 1, 1, 1]")
    arguments = load_arguments(["--yaml-cfg", "args.yaml"]).config.student.model_args.megatron_arguments
    assert layer_pattern(arguments["moe_layer_freq"]) == layer_pattern("[0]+[1]*3") == [0, 1, 1, 1]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("num_layer: 4", "args.yaml:34: num_layer is no argument of Megatron-LM; did you mean num_layers?"),
        ("bf16: maybe", "args.yaml:34: bf16 = maybe must be true or false"),
        ("log_interval: [1, 2]", "args.yaml:34: log_interval = [1, 2] must be one value"),
        ("adlr_autoresume: true", "adlr_autoresume = true is not supported; remove it"),
        (
            "rampup_batch_size: [32, 32, 65324160]",
            "--rampup-batch-size = 32 32 65324160 is not supported; give the final",
        ),
        ("save: /runs/${NOWHERE}", "names the environment variable NOWHERE, which is not set"),
        ("- 3", "args.yaml is not YAML"),
    ],
)
def test_a_mistake_in_the_file_is_one_sentence_with_its_line(folder: Path, change: str, sentence: str) -> None:
    with (folder / "args.yaml").open("a") as file:
        file.write(change)
    (line,) = mistakes("--yaml-cfg args.yaml")
    assert sentence in line and line.endswith((".", "?"))


def test_no_key_of_the_file_has_two_meanings() -> None:
    kinds = megatron_table.kinds()
    assert set(megatron_yaml.RENAMED.values()) <= kinds.keys()
    without = {*megatron_yaml.WITHOUT_EFFECT, *megatron_yaml.ONLY_FALSE}
    assert not [key for key in without if {key.replace("_", "-"), f"no-{key.replace('_', '-')}"} & kinds.keys()]


BASE = FLAGS.partition("--tokenizer-type")[0] + " --mock-data"


def test_the_two_files_of_gpt2_are_the_tokenizer(folder: Path) -> None:
    text = f"{BASE} --tokenizer-type GPT2BPETokenizer --vocab-file vocab.json"
    (folder / "vocab.json").write_text("{}")
    (line,) = mistakes(text)
    assert "--merge-file is not given; GPT2BPETokenizer needs the two files" in line
    (line,) = mistakes(f"{text} --merge-file nowhere.txt")
    assert "--merge-file = nowhere.txt is not a file" in line
    (folder / "merges.txt").write_text("")
    loaded = load_arguments(f"{text} --merge-file merges.txt".split())
    assert loaded.config.tokenizer == "gpt2:vocab.json,merges.txt"


def test_a_sentencepiece_file_is_read_with_what_hugging_face_has_beside_it(folder: Path) -> None:
    text = f"{BASE} --tokenizer-type Llama2Tokenizer --tokenizer-model llama/tokenizer.model"
    (folder / "llama").mkdir()
    (folder / "llama" / "tokenizer.model").touch()
    (line,) = mistakes(text)
    assert "has no tokenizer.json or tokenizer_config.json beside it" in line
    (folder / "llama" / "tokenizer_config.json").write_text(json.dumps({}))
    assert load_arguments(text.split()).config.tokenizer == "llama"
    (line,) = mistakes(f"{BASE} --tokenizer-type TikTokenizer --tokenizer-model x")
    assert line.startswith(
        "--tokenizer-type = TikTokenizer splits text by a pattern that its file does not have; convert"
    )


def test_layers_of_the_first_and_last_stage_have_keys(folder: Path) -> None:
    text = f"{FLAGS} --pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 1 --limbeck-strategy megatron"
    given = load_arguments(text.split()).config.student.strategy_args.strategy_config.megatron
    assert given.num_layers_in_first_pipeline_stage == 1
    both = {**yaml.safe_load(FILE), "decoder_last_pipeline_num_layers": 3}
    (folder / "args.yaml").write_text(yaml.safe_dump(both))
    found = load_arguments(["--yaml-cfg", "args.yaml", "--limbeck-strategy", "megatron"]).config
    assert found.student.strategy_args.strategy_config.megatron.num_layers_in_last_pipeline_stage == 3
    assert re.search("num_layers_in_first_pipeline_stage", megatron_table.meaning("decoder-first-pipeline-num-layers"))
