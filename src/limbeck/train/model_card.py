"""The model card of a trained student, from what its checkpoint and its run have recorded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from limbeck.train.checkpoint import MANIFEST, TRAINING
from limbeck.version import VERSION

_METRICS = {
    "val/loss": "validation loss",
    "val/ce": "validation cross-entropy",
    "val/kd": "validation divergence from the teacher",
    "val/top1_agreement": "share of validation tokens with the teacher's most likely token",
    "train/loss": "training loss of the last logged step",
}


def model_card(checkpoint: Path, repo_id: str) -> str:
    """The text of README.md, with the metadata that the hub reads.

    Local paths are shortened to their last component; environment variables and tokens are not in what it reads.

    Args:
        checkpoint: a ``checkpoint-<step>`` folder. Metrics are read from ``metrics.jsonl`` beside it or in ``output_dir``.
        repo_id: the repository that it is written for.
    """
    config = json.loads((checkpoint / TRAINING / "state.json").read_text())["config"]
    step = json.loads((checkpoint / MANIFEST).read_text())["step"]
    student, teacher = (config[role]["model_args"]["model_name_or_path"] for role in ("student", "teacher"))
    datasets = [name for name, is_hub in _datasets(config) if is_hub]
    metadata: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["distillation", "limbeck"],
    }
    if _is_hub_id(student):
        metadata["base_model"] = student
    if datasets:
        metadata["datasets"] = datasets
    title = repo_id.rpartition("/")[2]
    trained = f"distilled from {_name(teacher)}" if teacher else "trained without a teacher"
    parts = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n",
        f"# {title}\n",
        f"{_name(student)}, {trained} with Limbeck {VERSION}.\n",
        _table("Training", ("", ""), _training(config, step)),
    ]
    if metrics := list(_metrics(checkpoint, config, step)):
        parts.append(_table("Metrics", ("metric", f"at step {step}"), metrics))
    parts.append(
        "## Use\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}")\n'
        f'model = AutoModelForCausalLM.from_pretrained("{repo_id}")\n```\n'
    )
    return "\n".join(parts)


def _training(config: Mapping[str, Any], step: int) -> Iterator[tuple[str, str]]:
    model_args, training = config["student"]["model_args"], config["student"]["training_args"]
    yield "student", _name(model_args["model_name_or_path"])
    weight = config["distill_loss_weight"]
    if weight:
        yield "teacher", _name(config["teacher"]["model_args"]["model_name_or_path"] or config["teacher"]["source"])
    yield "data", ", ".join(name for name, _ in _datasets(config))
    yield "objective", _objective(config, weight)
    yield "steps", str(step)
    yield "learning rate", f"{training['learning_rate']:g}, {training['lr_scheduler_type']}"
    yield "tokens of a row", f"at most {config['sequence_length']}"
    yield "precision", model_args["dtype"]
    if model_args["lora_target"]:
        yield "LoRA", f"rank {model_args['lora_rank']} on {model_args['lora_target']}, merged"
    frozen = ("unfrozen_parameters", "frozen_parameters", "freeze_module_prefix")
    if any(model_args.get(key) for key in frozen):
        yield "trained parameters", "a selection; the others are those of the student"


def _objective(config: Mapping[str, Any], weight: float) -> str:
    temperature = config["kd_temperature"]
    squared = f" · {temperature:g}²" if config["temperature_squared"] and temperature != 1 else ""
    top = f" over the teacher's {config['logits_topk']} most likely tokens" if config["logits_topk"] else ""
    divergence = f"{weight:g} · {config['kd_objective']}{squared} at temperature {temperature:g}{top}"
    ce = f"{1 - weight:g} · cross-entropy"
    return " + ".join(term for term, used in ((divergence, weight > 0), (ce, weight < 1)) if used)


def _metrics(checkpoint: Path, config: Mapping[str, Any], step: int) -> Iterator[tuple[str, str]]:
    """The last value of each metric up to the step of the checkpoint."""
    folders = (checkpoint.parent, Path(config["output_dir"]))
    file = next((folder / "metrics.jsonl" for folder in folders if (folder / "metrics.jsonl").is_file()), None)
    latest: dict[str, float] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file else ():
        try:
            values = json.loads(line)
        except ValueError:  # a run that was killed may leave half a line
            continue
        if values.get("step", 0) <= step:
            latest |= values
    yield from ((title, f"{latest[key]:.4f}") for key, title in _METRICS.items() if key in latest)


def _datasets(config: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """The name of each data source, and whether it is a dataset on the hub."""
    data = config["student"]["data_args"]
    names = [f"hub:{one['hub']}" if one.get("hub") else one["path"] for one in data["sources"] or ()]
    for name in [*names, *(data["file_name"] or ())]:
        for one in [name] if isinstance(name, str) else name:
            hub = one.removeprefix("hub:") if one.startswith("hub:") else None
            yield _name(hub or one), _is_hub_id(hub)


def _is_hub_id(name: str | None) -> bool:
    return name is not None and name.count("/") == 1 and name[0] not in "./~" and not Path(name).exists()


def _name(name: str) -> str:
    """A hub id, or the last component of a path."""
    return name if _is_hub_id(name) else Path(name).name


def _table(title: str, header: tuple[str, str], rows: Any) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows]
    return "\n".join([f"## {title}\n", f"| {header[0]} | {header[1]} |", "|---|---|", *lines, ""])
