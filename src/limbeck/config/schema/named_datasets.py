"""Datasets that have a short name: ``hub: gsm8k`` instead of the name, configuration, split and columns on the hub."""

from __future__ import annotations

from typing import Any

_GSM8K = ({"hub": "openai/gsm8k", "config": "main"},)
_DAPO = {"question_key": "prompt.0.content", "answer_key": "reward_model.ground_truth"}
_PROBLEM = {"question_key": "problem"}

NAMED_DATASETS: dict[str, tuple[dict[str, Any], ...]] = {
    "AIME2024": ({"hub": "HuggingFaceH4/aime_2024", **_PROBLEM},),
    "AIME2025": tuple(
        {"hub": "opencompass/AIME2025", "config": config, "split": "test"} for config in ("AIME2025-I", "AIME2025-II")
    ),
    "AIME2026": ({"hub": "MathArena/aime_2026", **_PROBLEM},),
    "DAPOMath17K": ({"hub": "BytedTsinghua-SIA/DAPO-Math-17k", **_DAPO},),
    "DAPOMathAIME2024": ({"hub": "BytedTsinghua-SIA/AIME-2024", **_DAPO},),
    "DeepScaler": ({"hub": "agentica-org/DeepScaleR-Preview-Dataset", **_PROBLEM},),
    "GSM8K": _GSM8K,
    "MATH-500": ({"hub": "HuggingFaceH4/MATH-500", "split": "test", **_PROBLEM},),
    "OpenMathInstruct-2": (
        {"hub": "nvidia/OpenMathInstruct-2", "split": "train_1M", **_PROBLEM, "answer_key": "expected_answer"},
    ),
    "OpenR1-Math-220k": ({"hub": "open-r1/OpenR1-Math-220k", "config": "default", **_PROBLEM},),
    "gsm8k": _GSM8K,
    "math_cl": ({"hub": "pe-nlp/math-cl", **_PROBLEM, "answer_key": "ground_truth_answer"},),
    "tulu3_sft_mixture": ({"hub": "allenai/tulu-3-sft-mixture", "format": "messages"},),
}
"""Name to the sources of the dataset: the keys of entries of ``data_args.sources``. The columns are ``question`` and
``answer``, and the split is ``train``, where nothing else is written."""

_COLUMNS = {"question_key": "question", "answer_key": "answer"}


def expand_name(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of ``data_args.sources`` that an entry stands for: several for a named dataset that has several parts.

    The keys of ``entry`` win over those of the table.
    """
    parts = NAMED_DATASETS.get(str(entry.get("hub")), ())
    if not parts:
        return [entry]
    given = {key: value for key, value in entry.items() if value is not None and key != "hub"}
    return [{**({} if "format" in part else _COLUMNS), **part, **given} for part in parts]
