"""Student and teacher of Megatron-LM's command line: checkpoints, architecture, and NeMo's ``model_config.yaml``."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from limbeck.config.dialects import megatron_table as table
from limbeck.config.dialects.files import read_mapping
from limbeck.config.dialects.megatron_checkpoints import (
    NAME,
    Start,
    find_checkpoint,
    is_hugging_face,
    layers_and_experts,
)
from limbeck.config.locations import SourceLocation
from limbeck.config.translation import Translation
from limbeck.config.validation_errors import format_value
from limbeck.folders import is_megatron_checkpoint

ARGUMENTS = sorted(
    {name.replace("-", "_") for name in table.MODEL_VALUES}
    | {name for name, _ in table.MODEL_SWITCHES.values()}
    | {"seq_length", "vocab_size", "padded_vocab_size"}
)
"""Megatron's arguments that describe a model."""


def number(value: Any) -> Any:
    """The number that a text is, or the value."""
    if isinstance(value, str):
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                pass
    return value


def whole(result: Translation, given: Mapping[str, Any], name: str, default: int, least: int = 0) -> int:
    """The whole number that a flag has, or ``default``; anything else, or a number below ``least``, is an error."""
    value = number(given.get(name, default))
    if type(value) is int and least <= value < 2**63:
        return value
    below = type(value) is int and 0 <= value < least
    result.refuse(
        f"--{name}", f"= {format_value(given[name])} must be {f'at least {least}' if below else 'a whole number'}"
    )
    return default


def translate_student(result: Translation, given: Mapping[str, Any], start: Start) -> None:
    """Set the student's weights or its architecture, and the tokenizer."""
    named = result.get(NAME) or result.get("student_pretrain")
    if start.name is not None and not (start.resumed and named):
        result.default(NAME, start.name, start.flag)
    name = named or start.name
    _tokenizer(result, given, name)
    whole(result, given, "make-vocab-size-divisible-by", 128, least=1)
    described = architecture(result, given)
    of_hugging_face, of_run = name is not None and is_hugging_face(name), start.name is not None and start.resumed
    if of_hugging_face or (name is not None and "use-checkpoint-args" in given) or (of_run and not start.arguments):
        unread = [flag for flag in table.MODEL_VALUES | table.MODEL_SWITCHES.keys() if flag in given]
        result.ignored.extend(f"--{flag}" for flag in unread if f"--{flag}" not in result.ignored)
        described = {}
    else:
        _pattern(result, given)
    if start.arguments and not of_hugging_face:
        described |= _as_before(result, described, start)
    for argument, (value, flag) in described.items():
        result.put(f"student.model_args.megatron_arguments.{argument}", value, f"--{flag}")


def _as_before(
    result: Translation, described: Mapping[str, tuple[Any, str]], start: Start
) -> dict[str, tuple[Any, str]]:
    """The arguments of the run that is resumed. A flag with another value would be of another model, and is an error."""
    for name, (value, flag) in described.items():
        before = start.arguments.get(name, value)
        if before != value and name != "seq_length":  # the number of positions of a new model, which this one is not
            result.refuse(
                f"--{flag}",
                f"= {format_value(value)} contradicts {name} = {format_value(before)} of the run that goes on from "
                f"{start.resumed}; remove it, or give another --save for a new run",
            )
    return {name: (value, described.get(name, (None, "load"))[1]) for name, value in start.arguments.items()}


def _pattern(result: Translation, given: Mapping[str, Any]) -> None:
    """Refuse an empty pattern of a hybrid's layers, and other arguments that describe other layers than the pattern."""
    flags = [flag for flag in ("hybrid-layer-pattern", "hybrid-override-pattern") if flag in given]
    for flag in flags:
        if not given[flag].strip():
            result.refuse(
                f"--{flag}", "is empty; give a symbol for each layer, or remove it and give their number, --num-layers"
            )
            return
    if not flags:
        return
    flag, pattern = flags[0], given[flags[0]]
    symbols = pattern.replace("|", "")
    if any(given[other].replace("|", "") != symbols for other in flags[1:]):
        result.refuse(f"--{flag}", f"= {pattern} contradicts --{flags[1]} = {given[flags[1]]}; keep one of them")
    for other, symbol in (("hybrid-attention-ratio", "*"), ("hybrid-mlp-ratio", "-")):
        ratio = number(given.get(other, 0))
        # Numbers that are no ratios are errors of their own.
        if isinstance(ratio, (int, float)) and 0 < ratio <= 1 and round(ratio * len(symbols)) != symbols.count(symbol):
            result.refuse(
                f"--{other}",
                f"= {given[other]} contradicts --{flag} = {pattern}, of whose {len(symbols)} layers "
                f"{symbols.count(symbol)} are {symbol}; keep the pattern only",
            )
    if symbols != pattern:
        result.notices.append(
            f"the | in --{flag} have no effect: the layers are divided among --pipeline-model-parallel-size stages as those "
            "of other models are."
        )


def architecture(result: Translation, given: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Megatron's arguments of the model that flags describe, each with its value and its flag."""
    if "num-query-groups" in given and "group-query-attention" not in given:
        # Megatron-LM then has as many groups as heads. Files of NeMo have no such switch.
        result.ignored.append("--num-query-groups")
        given = {flag: value for flag, value in given.items() if flag != "num-query-groups"}
    found = {
        name.replace("-", "_"): (number(given[name]), name) for name in sorted(table.MODEL_VALUES) if name in given
    }
    found |= {name: (value, flag) for flag, (name, value) in table.MODEL_SWITCHES.items() if flag in given}
    hybrid = given.get("export-model-type") in table.HYBRID_MODELS
    if found and (hybrid or "spec" in given):  # only the specs of hybrids are accepted
        found.setdefault("is_hybrid_model", (True, "export-model-type" if hybrid else "spec"))
    if found and "seq-length" in given:
        found["seq_length"] = (number(given["seq-length"]), "seq-length")
    return found


def _tokenizer(result: Translation, given: Mapping[str, Any], start: str | None) -> None:
    kind, model, size = (given.get(name) for name in ("tokenizer-type", "tokenizer-model", "vocab-size"))
    if kind == "NullTokenizer":
        if size is None:
            result.refuse("--tokenizer-type", "= NullTokenizer needs --vocab-size, the number of token ids")
        else:
            result.default("tokenizer", f"null:{size}", "--vocab-size")
    elif kind == "GPT2BPETokenizer":
        _gpt2(result, given)
    elif kind in _SENTENCEPIECE and model is not None:
        _sentencepiece(result, kind, Path(model))
    elif kind not in (None, "HuggingFaceTokenizer", *_SENTENCEPIECE):
        reason, shown = _OTHER_TOKENIZERS.get(kind, "is not supported"), kind or '""'
        result.refuse(
            "--tokenizer-type",
            f"= {shown} {reason}; convert it to a folder with a tokenizer.json, and give HuggingFaceTokenizer with "
            "--tokenizer-model FOLDER",
        )
        result.default("tokenizer", shown, "--tokenizer-type")  # one error is enough
    elif model is not None:
        result.default("tokenizer", model, "--tokenizer-model")
    elif result.get("tokenizer") is None and not (start is not None and is_hugging_face(start)):
        result.refuse(
            "--tokenizer-model", "is not given; give --tokenizer-type HuggingFaceTokenizer and a folder or hub id"
        )
    if size is not None and kind != "NullTokenizer":
        result.ignored.append("--vocab-size")  # the tokenizer has it


_SENTENCEPIECE = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
_OTHER_TOKENIZERS = {
    "TikTokenizer": "splits text by a pattern that its file does not have",
    "MultimodalTokenizer": "is for images, and Limbeck distils text models only",
}
"""Why these are not supported."""


def _gpt2(result: Translation, given: Mapping[str, Any]) -> None:
    """``--vocab-file`` and ``--merge-file``: the byte-level tokens of GPT-2."""
    files = {flag: given.get(flag) for flag in ("vocab-file", "merge-file")}
    for flag, name in files.items():
        if name is None or not Path(name).is_file():
            shown = "is not given" if name is None else f"= {name} is not a file"
            result.refuse(f"--{flag}", f"{shown}; GPT2BPETokenizer needs the two files of GPT-2's tokens and merges")
    if result.get("tokenizer") is None:
        result.put("tokenizer", f"gpt2:{files['vocab-file']},{files['merge-file']}", "--vocab-file")


def _sentencepiece(result: Translation, kind: str, model: Path) -> None:
    """``--tokenizer-model FILE`` in a folder that Transformers reads, as those of Hugging Face are."""
    folder = model if model.is_dir() else model.parent
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        result.refuse(
            "--tokenizer-model",
            f"= {model} has no tokenizer.json or tokenizer_config.json beside it, from which Transformers reads a {kind}; copy "
            "it from the model's Hugging Face folder, or give --tokenizer-type HuggingFaceTokenizer with that folder",
        )
    result.default("tokenizer", str(folder), "--tokenizer-model")


def translate_teacher(result: Translation, given: Mapping[str, Any], locations: dict[str, SourceLocation]) -> None:
    """Set the teacher's checkpoint, and the arguments that its ``model_config.yaml`` replaces in it."""
    flag = "export-kd-teacher-load"
    name = given.get(flag)
    if name is None:
        if not any(
            result.get(key) for key in ("teacher.model_args.model_name_or_path", "teacher_pretrain", "teacher.source")
        ):
            for own in [one for one in ("export-kd-cfg", "export-kd-distill-cfg") if one in given]:
                result.refuse(f"--{own}", f"needs --{flag}; give the teacher too, or remove --{own}")
                result.pop("distillation_config")  # one error is enough
            result.default("distill_loss_weight", 0.0, f"no --{flag}")
            result.notices.append(f"--{flag} is not given, so the student is trained without a teacher.")
        return
    name = find_checkpoint(name) or name
    result.default("teacher.model_args.model_name_or_path", name, f"--{flag}")
    if result.get("distillation_config") is None:  # ModelOpt's defaults: the divergence of whole vocabularies alone
        result.default("distill_loss_weight", 1.0, f"--{flag}")
    folder, config_flag = Path(name), "export-kd-teacher-model-config"
    named = given.get(config_flag)
    file = Path(named) if named is not None else folder / "model_config.yaml"
    if is_hugging_face(name):
        if file.is_file():
            result.notices.append(f"{file} is not read: {name} has a config.json, which describes the teacher.")
        elif named is not None:
            result.refuse(
                f"--{config_flag}", f"= {file} is not a file; leave it out, as {name} has a config.json for the teacher"
            )
    elif file.is_file() and not is_megatron_checkpoint(name):
        result.refuse(f"--{flag}", f"= {name} has no checkpoint of Megatron-LM; check the path")
    elif named is not None or file.is_file():
        content = read_mapping(file, f"--{config_flag}", locations)
        arguments = nemo_arguments(result, content, str(file))
        _teacher_tokenizer(result, content, str(file), arguments)
        result.put("teacher.model_args.megatron_arguments", arguments, f"--{config_flag}")
    elif is_megatron_checkpoint(name):
        result.notices.append(f"{file} does not exist: the teacher has the arguments that its checkpoint stores.")
    else:
        result.refuse(
            f"--{flag}",
            f"= {name} has no checkpoint of Megatron-LM or Hugging Face, and no model_config.yaml; check the path",
        )


def share_with_teacher(result: Translation, given: Mapping[str, Any]) -> None:
    """Divide the experts and the stages of the teacher as those of the student, where its model can be divided so.

    In Megatron-LM both models have one layout.
    """
    student, teacher = (f"{role}.strategy_args.strategy_config" for role in ("student", "teacher"))
    name = result.get("teacher.model_args.model_name_or_path") or result.get("teacher_pretrain")
    if name is None or result.get("teacher.strategy_args.strategy_name") != "megatron_infer":
        return
    shared = [flag for flag in (*table.OF_EXPERTS, *table.OF_STAGES) if flag in given]
    if not shared:
        return
    layers, experts = layers_and_experts(str(name), result.get("teacher.model_args.megatron_arguments") or {})
    values = {flag: number(result.get(f"{student}.megatron.{table.megatron_key(flag)}")) for flag in shared}
    ends = [value for flag, value in values.items() if flag in table.OF_STAGES and isinstance(value, int)]
    rest, stages = (layers or 0) - sum(ends), number(result.get(f"{teacher}.pipeline_model_parallel_size")) or 1
    others = stages - len(ends) if isinstance(stages, int) else -1
    fits = layers is not None and stages != 1 and (rest == 0 if others == 0 else rest >= others > 0 == rest % others)
    for flag, value in values.items():
        if experts if flag in table.OF_EXPERTS else fits:
            result.default(f"{teacher}.megatron.{table.megatron_key(flag)}", value, f"--{flag}")
    alone = [f"--{flag}" for flag in shared if (experts is None if flag in table.OF_EXPERTS else not fits)]
    if alone:
        result.notices.append(
            f"{', '.join(alone)}: of the student only, as {name} is not known to be a teacher that can be divided so; "
            f"{teacher}.megatron.{table.megatron_key(alone[0][2:])} is the key of the teacher."
        )


def student_layers(result: Translation, given: Mapping[str, Any], start: Start) -> int:
    """The number of the student's layers, of its checkpoint or of the flags; 0 if it is not known."""
    of_flags = "num-layers" in given and "use-checkpoint-args" not in given
    if of_flags and (start.name is None or not is_hugging_face(start.name)):
        return whole(result, given, "num-layers", 0)
    layers, _ = layers_and_experts(start.name, start.arguments)
    return layers or whole(result, given, "num-layers", 0)


def nemo_arguments(result: Translation, content: Mapping[str, Any], file: str) -> dict[str, Any]:
    """Megatron's arguments for the keys of a NeMo file. Keys that do not describe the model have no effect."""
    found: dict[str, Any] = {}
    others = {flag.replace("-", "_") for flag in table.kinds().keys() - table.ONLY.keys()}
    known = [*ARGUMENTS, *table.NEMO, *table.NEMO_ONLY, *table.NEMO_IGNORED, *_CONVERTED, *others]
    for key, value in content.items():
        if key in (*table.NEMO_IGNORED, *table.NEMO_TOKENIZER):
            continue
        if key in table.NEMO_ONLY:
            if value is not None and value not in table.NEMO_ONLY[key]:
                result.refuse(key, f"= {format_value(value)} in {file} describes a model that is not supported")
        elif key in _CONVERTED:
            _convert(result, key, value, found, file)
        elif key in table.NEMO or key in ARGUMENTS:
            if value is not None:
                found[table.NEMO.get(key, key)] = value
        elif key not in others:
            near = difflib.get_close_matches(key, known, n=1)
            result.refuse(
                key,
                f"in {file} is not a key of a teacher's model_config.yaml{f'; did you mean {near[0]}?' if near else ''}",
            )
    return found


def _teacher_tokenizer(result: Translation, content: Mapping[str, Any], file: str, arguments: dict[str, Any]) -> None:
    """Add the tokenizer of a NeMo file to the teacher's ``arguments`` if the models have two, else name it in a notice."""
    given = content.get("tokenizer")
    section = given if isinstance(given, Mapping) else {"model": given}
    of_library = "type" if section.get("library") == "huggingface" else "model"  # NeMo's type is then a name on the hub
    name = content.get("tokenizer_model") or section.get(of_library) or section.get("type")
    if not name:
        return
    name = str(Path(str(name)).parent if Path(str(name)).is_file() else name)
    if result.get("cross_tokenizer") not in (None, False, "off"):
        arguments["tokenizer_model"] = name
    elif name != result.get("tokenizer"):
        result.notices.append(
            f"the tokenizer {name} in {file} is not read: the teacher has that of the run. If that is another one, set "
            "cross_tokenizer=hybrid."
        )


_CONVERTED = (
    "activation",
    "share_embeddings_and_output_weights",
    "normalization",
    "precision",
    "position_embedding_type",
    "bf16",
    "fp16",
    "disable_bias_linear",
    "use_rotary_position_embeddings",
)
_ACTIVATIONS = {
    "swiglu": {"swiglu": True},
    "fast-swiglu": {"swiglu": True},
    "squared-relu": {"squared_relu": True},
    "gelu": {},
}
_NORMS = {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}
_PRECISIONS = {
    **dict.fromkeys(("bf16", "bf16-mixed", "bf16-true"), "bf16"),
    **dict.fromkeys(("fp16", "16", "16-mixed", "16-true"), "fp16"),
    **dict.fromkeys(("32", "32-true"), "fp32"),
}
"""NeMo's and Lightning's spellings. A teacher has no master weights, which are what tells ``-mixed`` from ``-true``."""


def _convert(result: Translation, key: str, value: Any, found: dict[str, Any], file: str) -> None:
    """Add the arguments of a key whose value has another form in Megatron."""
    if key == "activation" and isinstance(value, str) and value in _ACTIVATIONS:
        found.update(_ACTIVATIONS[value])
    elif key == "share_embeddings_and_output_weights" and isinstance(value, bool):
        found["untie_embeddings_and_output_weights"] = not value
    elif key == "normalization" and isinstance(value, str):
        found["normalization"] = _NORMS.get(value.lower(), value)
    elif key == "position_embedding_type":
        found[key] = "rope" if value is None else value  # as ModelOpt reads NeMo's null
    elif key in ("bf16", "fp16") and isinstance(value, bool):
        if value:
            result.put("teacher.model_args.dtype", key, f"{key} in {file}")
    elif key in ("disable_bias_linear", "use_rotary_position_embeddings") and isinstance(value, bool):
        found[key] = value
    elif key == "precision" and str(value).lower() in _PRECISIONS:
        dtype = _PRECISIONS[str(value).lower()]
        result.put("teacher.model_args.dtype", dtype, f"precision in {file}")
    else:
        result.refuse(key, f"= {json.dumps(value, default=str)} in {file} is not a value that Limbeck can translate")
