"""What a run reads of tokens that the student has written: sampled objectives, rewards, and the writer's log-probabilities."""

import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from runs import metrics
from tiny import make_model

from limbeck import DistillPipeline, LimbeckError
from limbeck.config import load_mapping
from limbeck.registry import GENERATORS
from limbeck.rollout.environments import EnvironmentStep, MathEnvironment
from limbeck.strategies.world import World
from limbeck.train.metrics import check_best_metric
from limbeck.train.on_policy import GAP_METRICS, LogProbGap, OnPolicyLoss
from limbeck.train.samples import DATASET, STUDENT, Sample, to_examples

REWARDED = {"rollout.environment": "exact", "rollout.num_generations": 2, "rollout.reward_weight": 2.0}
SHORT = {
    "distill_loss_weight": 1.0, "rollout.max_new_tokens": 6, "eval_steps": 0, "save_steps": 0, "max_steps": 2,
    "student.training_args.per_device_train_batch_size": 4,
}  # fmt: skip
STUDENTS = {
    "hybrid": {"kind": "nemotron_h", "hybrid_override_pattern": "M-*M", "head_dim": 8, "mamba_num_heads": 4,
               "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 8, "chunk_size": 16},
    "experts": {"kind": "qwen3_moe", "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "sliding window": {"kind": "mistral", "sliding_window": 5},
}  # fmt: skip
ALONE = World(0, 1, torch.device("cpu"))


@pytest.mark.parametrize(
    "changes",
    [
        {"kd_objective": "k2", "rollout.temperature": 0.7, "student.use_sequence_packing": True},
        {"kd_objective": "reverse_kl", "logits_topk": 5, "topk_from": "student", "logits_topk_tail": "bucket"},
        {"rollout.temperature": 0.0},
    ],
    ids=["k2-packed", "student-top-k", "greedy"],
)
def test_the_generators_log_probabilities_are_those_of_training(configure, changes):
    found = DistillPipeline(configure(**{**SHORT, **changes})).run().metrics
    assert 0 < found["rollout/log_prob_gap_mean"] <= found["rollout/log_prob_gap_max"] < 1e-4
    assert found["rollout/log_prob_gap_share"] == 0
    assert found["train/train_distill_loss"] > 0


@pytest.mark.parametrize("kind", STUDENTS)
def test_every_kind_of_student_trains_on_what_it_has_written(configure, tmp_path, kind):
    models = {
        f"{role}_pretrain": str(make_model(tmp_path / role, seed=seed, **STUDENTS[kind]))
        for seed, role in enumerate(("student", "teacher"))
    }
    changes = {**models, "student.use_sequence_packing": True, "rollout.max_new_tokens": 16}
    found = DistillPipeline(configure(**{**SHORT, **changes})).run().metrics
    assert found["rollout/log_prob_gap_max"] < 1e-3
    assert found["train/train_distill_loss"] > 0


def test_a_policy_gradient_of_fresh_samples_is_the_estimate_of_the_reverse_kl(configure, tmp_path):
    """The ratio is 1, so the loss is −Σ (log p − log q), over the written tokens of a step that has others too."""
    changes = {"kd_objective": "policy_gradient", "rollout.on_policy_fraction": 0.5, "max_steps": 1}
    DistillPipeline(configure(**{**SHORT, **changes, "output_dir": str(tmp_path / "half")})).run()
    (loss,), (policy,) = (metrics(tmp_path / "half", f"train/{key}") for key in ("loss", "policy_loss"))
    assert loss == pytest.approx(policy)
    DistillPipeline(configure(**{**SHORT, **changes, "rollout.on_policy_fraction": 1.0})).run()
    (policy,), (estimate,) = (
        metrics(tmp_path / "out", f"train/{key}") for key in ("policy_loss", "train_distill_loss")
    )
    assert policy == pytest.approx(estimate, rel=1e-4) and policy != loss


def test_every_metric_of_a_run_may_select_the_best_checkpoint(configure, tmp_path):
    best, best_mode = "checkpoint_config.best_metric", "checkpoint_config.best_mode"
    changes = {**SHORT, "max_steps": 1, "kd_objective": "policy_gradient", "rollout.environment": "exact"}
    found = DistillPipeline(configure(**changes, **{best: "rollout/log_prob_gap_mean"})).run().metrics
    assert (tmp_path / "out" / "best").exists()
    assert {"train/policy_loss", "rollout/log_prob_gap_max", "rollout/reward", "student/grad_norm"} < set(found)
    of_source = [name for name in found if name.startswith(("rollout/", "time/")) and name not in GAP_METRICS]
    for name in (*found, "rollout/reward_reasons/timeout"):
        for known in (None, of_source):
            check_best_metric(configure(**changes, **{best: name, best_mode: "max"}), ALONE, known)
    assert found["train/teacher_entropy"] > 0
    apart = {"teacher.service": "a", **changes}  # which sends the probabilities of the sampled tokens only
    for absent, own in (("policy_loss", SHORT), ("teacher_entropy", apart), ("top1_agreement", apart)):
        with pytest.raises(LimbeckError, match="not a metric of this run"):
            check_best_metric(configure(**own, **{best: f"train/{absent}", best_mode: "max"}), ALONE)
    pairs = {"features.pairs": [["model.norm", "model.norm"]], best: "train/features/model.norm"}
    check_best_metric(configure(**SHORT, **pairs), ALONE, of_source)


def test_later_steps_on_one_rollout_are_compared_with_the_weights_that_wrote(configure, tmp_path):
    changes = {"kd_objective": "policy_gradient", "rollout.steps_per_rollout": 2, "max_steps": 4}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The generator's log-prob")  # older weights are no mistake
        DistillPipeline(configure(**{**SHORT, **changes})).run()
    gaps = metrics(tmp_path / "out", "rollout/log_prob_gap_mean")
    assert max(gaps[0::2]) < 1e-4 < 1e-2 < min(gaps[1::2])
    policy, estimate = (metrics(tmp_path / "out", f"train/{key}") for key in ("policy_loss", "train_distill_loss"))
    assert policy[0::2] == pytest.approx(estimate[0::2], rel=1e-3)  # the ratios are 1
    assert abs(policy[1] - estimate[1]) > 1e-4


def register(name, change):
    """A generator whose completions are those of hf, changed."""

    def make(config, world):
        made = GENERATORS.get("hf")(config, world)
        plain = made.generate
        made.generate = lambda prompts, sampling: [change(one) for one in plain(prompts, sampling)]
        return made

    GENERATORS.register(name)(make)


def test_a_large_difference_is_warned_about_once(configure):
    register("wrong", lambda one: replace(one, log_probs=tuple(value - 0.5 for value in one.log_probs)))
    with pytest.warns(UserWarning, match="differ from the student's in training by 0.500 on average") as seen:
        found = DistillPipeline(configure(**SHORT, **{"rollout.generator": "wrong"})).run().metrics
    assert sum("log_prob_gap_limit" in str(one.message) for one in seen) == 1
    assert found["rollout/log_prob_gap_mean"] == pytest.approx(0.5, abs=1e-4)
    assert found["rollout/log_prob_gap_max"] == pytest.approx(0.5, abs=1e-4)
    assert found["rollout/log_prob_gap_share"] == 1


@pytest.mark.parametrize("changes", [{"rollout.max_staleness": 1}, {"rollout.steps_per_rollout": 2}])
def test_a_large_difference_is_warned_about_where_the_current_weights_have_written(configure, changes):
    register("wrong", lambda one: replace(one, log_probs=tuple(value - 0.5 for value in one.log_probs)))
    with pytest.warns(UserWarning, match="differ from the student's in training by 0.500 on average"):
        DistillPipeline(configure(**SHORT, **{"rollout.generator": "wrong", "logging_steps": 2, **changes})).run()


def test_a_generator_that_writes_nothing_is_reported_once(configure):
    register("silent", lambda one: replace(one, token_ids=(), log_probs=()))
    with pytest.warns(UserWarning, match="None of the 4 answers that were written for step 1 has a token") as seen:
        found = DistillPipeline(configure(**SHORT, **{"rollout.generator": "silent"})).run().metrics
    assert sum("has a token" in str(one.message) for one in seen) == 1
    assert found["train/supervised_tokens"] == 0


def test_the_gap_leaves_out_what_was_not_written_and_starts_anew():
    gap = LogProbGap(torch.device("cpu"), 0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gap.add(torch.tensor([-1.0, torch.nan, -3.0]), torch.tensor([-1.25, -2.0, torch.nan]))
        gap.add(torch.tensor([-1.0]), torch.tensor([-1.0]))
        gap.add(torch.zeros(0), torch.zeros(0))
        assert gap.read(ALONE) == {
            "rollout/log_prob_gap_mean": 0.125, "rollout/log_prob_gap_max": 0.25, "rollout/log_prob_gap_share": 0.5
        }  # fmt: skip
        gap.add(torch.tensor([torch.nan]), torch.tensor([-1.0]))
        assert gap.read(ALONE) == {}


def test_a_truncated_distribution_is_not_compared(configure):
    assert OnPolicyLoss.from_config(configure(**SHORT, **{"rollout.top_p": 0.9}), ALONE.device) is None
    assert OnPolicyLoss.from_config(configure(), ALONE.device) is None


def sample(row, number, reward, origin=STUDENT):
    answer = [7, 8]
    log_probs = [-0.5, -0.7] if origin == STUDENT else None
    return replace(Sample.written(row, number, origin, [1, 2], answer, log_probs, True), reward=reward)


def test_a_reward_is_compared_with_those_of_the_same_prompt():
    rewarded = [sample(0, 0, 1.0), sample(3, 0, 1.0), sample(0, 1, 0.0), sample(0, 2, None), sample(3, 1, 1.0)]
    given = to_examples([*rewarded, sample(5, 0, None, DATASET)], reward_weight=0.5)
    per_row = [given.advantages[low:high] for low, high in zip(given.offsets[:-1], given.offsets[1:], strict=True)]
    assert [row.tolist() for row in per_row] == [[x] * 4 for x in (0.25, 0.0, -0.25, 0.0, 0.0, 0.0)]
    assert np.isnan(given.sampled_log_probs[-4:]).all()
    assert to_examples(rewarded).advantages is None
    assert not to_examples([sample(0, 0, None)], reward_weight=0.5).advantages.any()


def test_rewards_change_the_loss_of_a_divergence(configure, monkeypatch):
    """By −Σ weight (reward − mean), for fresh samples."""
    rewards = iter([1.0, 0.0, 3.0, 0.0] * 9)

    def step(self, episodes, completions):
        return [EnvironmentStep(reward=next(rewards)) for _ in completions]

    monkeypatch.setattr(MathEnvironment, "step", step)
    found = DistillPipeline(configure(**SHORT | REWARDED | {"max_steps": 1})).run().metrics
    assert found["train/loss"] == pytest.approx(
        found["train/train_distill_loss"] + found["train/policy_loss"], rel=1e-6
    )
    assert found["train/policy_loss"] != 0


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"kd_objective": "policy_gradient", "rollout.top_p": 0.9}, "kd_objective has a policy gradient, for"),
        (REWARDED | {"rollout.temperature": 0.0}, "reward_weight has a"),
        (REWARDED | {"rollout.num_generations": 1}, "set rollout.num_generations to 2 or more"),
        (REWARDED | {"rollout.environment": None}, "rollout.reward_weight needs rewards; set rollout.environment"),
        (
            {"kd_objective": "policy_gradient", "rollout.temperature": 0.8},
            "kd_temperature = 1 is not the rollout.temperature = 0.8",
        ),
        ({"kd_objective": "k2", "rollout.on_policy_fraction": 0.5}, "use policy_gradient, which leaves other tokens out"),
        ({"rollout.policy_clip": [1.2, 0.2]}, "rollout.policy_clip = [1.2, 0.2] is not a range"),
        ({"kd_objective": "policy_gradient", "kd_objective_kwargs": {"clip": 1.0}}, "kd_objective_kwargs.clip is not read"),
    ],
)  # fmt: skip
def test_what_cannot_be_combined_is_refused(configure, changes, sentence):
    with pytest.raises(LimbeckError, match=re.escape(sentence)):
        configure(**SHORT | changes)


def test_a_generator_without_log_probabilities_has_no_policy_gradient(configure):
    register("silent", lambda one: replace(one, log_probs=None))
    with pytest.raises(LimbeckError, match=r"rollout.generator = silent gives no log-probabilities"):
        DistillPipeline(configure(**SHORT, **{"rollout.generator": "silent", "kd_objective": "policy_gradient"})).run()


def test_keys_that_nothing_reads_are_reported(settings):
    changes = {
        "rollout.policy_clip": [0.1, 0.1],
        "topk_from": "student",
        "rollout.top_k": 4,
        "rollout.log_prob_gap_limit": 1.0,
    }
    notices = " ".join(load_mapping(settings(**SHORT | changes)).notices)
    for key in ("rollout.policy_clip", "topk_from", "rollout.log_prob_gap_limit"):
        assert f"{key} " in notices
