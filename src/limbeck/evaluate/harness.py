"""Tasks of the LM Evaluation Harness (``lm-eval``): https://github.com/EleutherAI/lm-evaluation-harness."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from limbeck.errors import LimbeckError
from limbeck.evaluate.results import Result
from limbeck.evaluate.text_model import TextModel


def run_tasks(
    model: TextModel,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    chat_template: bool = False,
    include_path: str | None = None,
) -> list[Result]:
    """The metrics of lm-eval for each task, and for each group of tasks.

    Args:
        num_fewshot: examples in each prompt; by default those of the task.
        limit: most documents of each task.
        chat_template: write prompts with the model's chat template.
        include_path: folder with YAML files of further tasks.

    Raises:
        LimbeckError: without the library, or if a task is unknown or cannot run.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise LimbeckError(f"--tasks needs lm-eval ({error}); install it with: pip install 'limbeck[eval]'.") from error

    manager = TaskManager(include_path=include_path)
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise LimbeckError(f"lm-eval has no task {unknown[0]}; `lm-eval ls tasks` lists them.")
    begun = time.perf_counter()
    try:
        found = simple_evaluate(
            model=HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=batch_size),
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            apply_chat_template=chat_template,
            task_manager=manager,
            log_samples=False,
        )
    except Exception as error:  # a task is a program, which downloads its data and may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise LimbeckError(f"lm-eval cannot run {', '.join(tasks)}: {reason}") from error
    seconds = time.perf_counter() - begun
    settings = {"library": "lm-eval", "limit": limit, "chat_template": chat_template}
    return [
        Result(task, model.name, numbers, {**settings, "num_fewshot": found.get("n-shot", {}).get(task)}, seconds)
        for task, values in found["results"].items()
        if (numbers := _numbers(values))
    ]


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a task. lm-eval names them ``metric,filter``; the filter ``none`` is left out."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if "," in name and isinstance(value, (int, float)) and not isinstance(value, bool)
    }
