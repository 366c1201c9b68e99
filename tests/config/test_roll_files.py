"""``docs/coming-from-roll.md`` is true of ROLL's example files."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from limbeck.config import load_config
from limbeck.errors import LimbeckError

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT.parent / "shared" / "references" / "configs" / "roll"
PAGES = ("coming-from-roll.md", "coming-from-roll.zh.md")


def sections(page: str) -> dict[str, str]:
    """The sections of a page about example files, by the names of these files."""
    found: dict[str, str] = {}
    for section in (ROOT / "docs" / page).read_text(encoding="utf-8").split("\n### ")[1:]:
        title, _, text = section.partition("\n")
        found |= dict.fromkeys(re.findall(r"`(\w+\.yaml)`", title), text.split("\n## ")[0])
    return found


@pytest.mark.skipif(not FILES.is_dir(), reason="ROLL's files are not here")
@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("file", sorted(FILES.glob("*.yaml")), ids=lambda path: path.stem)
def test_an_example_file_of_roll_does_what_the_page_says(page: str, file: Path) -> None:
    text = sections(page)[file.name]
    errors = "".join(re.findall(r"```\n(.*?)\n```", text, re.DOTALL)).splitlines()
    found: list[str] = []
    try:
        load_config(file)
    except LimbeckError as error:
        found = str(error).splitlines()
    assert len(found) == len(errors)
    for line, documented in zip(found, errors, strict=True):
        assert line.endswith(f": {documented}")
    for command in re.findall(r"```bash\nlimbeck train \S+ (.*?)\n```", text):
        assert load_config(file, shlex.split(command)).dialect == "roll"


ON_POLICY = """
pretrain: small
response_length: 96
prompt_length: 32
num_return_sequences_in_group: 4
is_pure_opd: true
ppo_epochs: 1
student_train:
  training_args: {learning_rate: 1e-6}
  data_args: {file_name: rows.jsonl, dataset_dir: data, messages: messages, domain_interleave_probs: {math: 1.0}}
student_infer:
  generating_args: {temperature: 0.9, top_p: 0.8, top_k: -1, num_beams: 1, max_new_tokens: 96}
  strategy_args: {strategy_name: vllm, strategy_config: {gpu_memory_utilization: 0.5, load_format: auto}}
teacher: {model_args: {model_name_or_path: large}}
rewards: {math: {worker_cls: roll.MathRuleRewardWorker}}
validation:
  data_args: {file_name: valid.jsonl}
  generating_args: {temperature: 0.6, num_return_sequences: 2}
"""


def test_an_on_policy_file_is_a_run_with_a_rollout(load) -> None:
    loaded = load(yaml=ON_POLICY)
    config, rollout = loaded.config, loaded.config.rollout
    assert (config.student_pretrain, config.teacher.model_args.model_name_or_path) == ("small", "large")
    assert (config.kd_objective, config.distill_loss_weight, config.sequence_length) == ("reverse_kl", 1.0, 128)
    assert config.student.data_args.file_name == ["rows.jsonl"]
    assert (rollout.temperature, rollout.top_p, rollout.top_k) == (0.9, 0.8, 0)
    assert (rollout.max_new_tokens, rollout.num_generations) == (96, 4)
    assert (rollout.generator, rollout.generator_kwargs) == ("vllm", {"gpu_memory_utilization": 0.5})
    assert (rollout.environment, rollout.environment_kwargs) == ("math", {"answer_key": "ground_truth"})
    assert (config.validation.rollout.temperature, config.validation.rollout.num_generations) == (0.6, 2)
    origin = loaded.origins["student.training_args.learning_rate"]
    assert origin == "derived from student_train.training_args.learning_rate (run.yaml:8)"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("ppo_epochs=2", "command line: ppo_epochs = 2 trains several times on what is written; set it to 1."),
        (
            "student_infer.generating_args.num_beams=4",
            "command line: student_infer.generating_args.num_beams = 4 is not",
        ),
        (
            "student_train.training_args.learning_rat=1",
            "command line: student_train.training_args.learning_rat: student.",
        ),
        ("use_opd=true", "command line: use_opd belongs to reinforcement learning with a teacher"),
        ("pure_opd_pipeline_type=agentic", "command line: pure_opd_pipeline_type = agentic plays games"),
        (
            "+teacher={a: {model_args: {}}, b: {model_args: {}}}",
            "command line: teacher has the sections of several teachers (a, b)",
        ),
    ],
)
def test_what_is_not_translated_is_one_sentence(mistakes, override: str, sentence: str) -> None:
    (line,) = mistakes(override, yaml=ON_POLICY)
    assert line.startswith(sentence)


def test_the_requirements_are_the_package_with_some_of_its_extras() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = re.findall(r"^(\w+) = ", project.split("[project.optional-dependencies]")[1].split("\n[")[0], re.MULTILINE)
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if not line.startswith("#")]
    assert set(re.fullmatch(r"-e \.\[([\w,]+)\]", line)[1].split(",")) < set(extras)
