"""The command ``limbeck``. Each subcommand parses its arguments and calls one function, which imports what it needs."""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from limbeck.commands.conversion import add_convert_command
from limbeck.commands.dialogue import add_dialogue_commands
from limbeck.commands.evaluation import add_eval_command
from limbeck.errors import USER_MISTAKE, LimbeckError, Stopped
from limbeck.version import VERSION

if TYPE_CHECKING:
    from limbeck.config import DistillConfig, LoadedConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    A LimbeckError is printed to stderr without a traceback.

    Returns:
        The exit status: 0, 2 after a LimbeckError, or 128 + the number of a signal.
    """
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    if rest and hasattr(args, "overrides") and all(_is_override(argument) for argument in rest):
        args.overrides = [*args.overrides, *rest]  # argparse accepts no positional arguments after an option
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return int(args.run(args))
    except LimbeckError as error:
        print(f"limbeck: {error}", file=sys.stderr)
        if isinstance(error, Stopped):
            return 128 + error.signal
        return USER_MISTAKE
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `limbeck data show … | head`
        _discard_output()
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        _discard_output()
        print(f"limbeck: {error.filename or 'the output'} cannot be written: {error.strerror}.", file=sys.stderr)
        return USER_MISTAKE


def _discard_output() -> None:
    """At exit, the interpreter would flush into standard output, which takes nothing any more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_override(argument: str) -> bool:
    return argument.startswith("~") or ("=" in argument and not argument.startswith("-"))


class _Parser(argparse.ArgumentParser):
    """Reports a wrong argument in one line, as every other mistake."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_MISTAKE, f"limbeck: {message}; see `{self.prog} --help`.\n")


def _parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = _Parser(prog="limbeck", description="Distil large language models.")
    parser.add_argument("--version", action="version", version=f"limbeck {VERSION}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="distil a student as a configuration describes")
    _add_config_arguments(train)
    train.set_defaults(run=_train)

    serve = commands.add_parser("serve-teacher", help="load a teacher once for several runs, until Ctrl-C")
    _add_config_arguments(serve, "YAML file of one of the runs")
    serve.add_argument(
        "--name", help="name that runs set as teacher.service; default: teacher.service of the file, else teacher"
    )
    serve.set_defaults(run=_serve_teacher)

    check = commands.add_parser(
        "check",
        help="check files, machines, memory and data of a run, without training",
        description="Check files, machines, memory and data of a run, without training. Without a device_mapping the run has "
        "the number of processes in the environment variable WORLD_SIZE, which launchers such as torchrun set, or one; "
        "LOCAL_WORLD_SIZE is the number of those on this machine.",
    )
    _add_config_arguments(check)
    check.set_defaults(run=_check)

    config = commands.add_parser("config", help="print a configuration with all defaults and the origin of each value")
    _add_config_arguments(config, optional=True)
    config.add_argument("--schema", action="store_true", help="print the documentation of every key")
    config.set_defaults(run=_config)

    data = commands.add_parser("data", help="inspect or tokenize the training data")
    data_commands = data.add_subparsers(title="commands", required=True, metavar="COMMAND")
    show = data_commands.add_parser("show", help="print a row token by token, as the student and the teacher read it")
    _add_config_arguments(show)
    show.add_argument("--row", type=int, default=0, metavar="N", help="index of the row in the training files, from 0")
    show.add_argument("--file", metavar="FILE", help="read the row from this file instead of the training files")
    show.add_argument("--ids", action="store_true", help="print token ids too")
    show.set_defaults(run=_data_show)
    cache = data_commands.add_parser("cache", help="read, check and tokenize the data before training")
    _add_config_arguments(cache)
    cache.set_defaults(run=_data_cache)

    plan = commands.add_parser("plan", help="estimate memory, traffic and time of a run on GPUs")
    _add_config_arguments(plan)
    plan.add_argument("--nodes", type=int, default=1, metavar="N", help="number of machines; default: 1")
    plan.add_argument("--gpus-per-node", type=int, default=8, metavar="M", help="GPUs of each machine; default: 8")
    plan.add_argument(
        "--gpu", default="H100", help="type of GPU, such as H100, H200, A100, L40S or B200; default: H100"
    )
    plan.add_argument("--json", action="store_true", help="print JSON with bytes, FLOPs and seconds")
    plan.set_defaults(run=_plan)

    _add_deploy(commands)

    spectrum = commands.add_parser("spectrum", help="select the parameters to train by their signal-to-noise ratio")
    spectrum.add_argument("model", help="folder or Hugging Face id of the student's checkpoint")
    spectrum.add_argument(
        "--top-percent", type=float, default=50, metavar="P", help="share of each kind of matrix; default: 50"
    )
    spectrum.add_argument(
        "--output", type=Path, default=Path("spectrum.yaml"), help="file to write; default: spectrum.yaml"
    )
    spectrum.add_argument("--revision", help="branch, tag or commit on the hub")
    spectrum.set_defaults(run=_spectrum)

    demo = commands.add_parser("demo", help="compare training with and without a teacher on a small example")
    demo.add_argument("--output", type=Path, default=Path("limbeck-demo"), help="output folder; default: limbeck-demo")
    demo.add_argument("--seed", type=int, default=0, help="seed of the problems and the weights; default: 0")
    demo.set_defaults(run=_demo)

    push = commands.add_parser("push", help="upload the student of a run to the Hugging Face hub")
    push.add_argument("run_folder", type=Path, metavar="RUN", help="output folder of a run, or a checkpoint in it")
    push.add_argument("--repo-id", metavar="OWNER/NAME", help="repository; default: that of the run's configuration")
    push.add_argument("--checkpoint", metavar="NAME", help="such as best or checkpoint-50; default: the newest")
    push.add_argument("--branch", help="branch to upload to; default: that of the configuration, else main")
    visibility = push.add_mutually_exclusive_group()
    visibility.add_argument("--private", action="store_true", help="make a new repository private; default: configured")
    visibility.add_argument("--public", dest="private", action="store_false", help="make a new repository public")
    push.set_defaults(private=None)
    push.set_defaults(run=_push)

    add_dialogue_commands(commands)
    add_eval_command(commands)
    add_convert_command(commands)

    report = commands.add_parser("report", help="write an HTML report of a run")
    report.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="output folder of a run; several runs are compared"
    )
    report.add_argument("--output", type=Path, help="file to write; default: report.html in the first RUN")
    report.set_defaults(run=_report)
    return parser


def _add_deploy(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    deploy = commands.add_parser("deploy", help="write the files that start a run on a cluster")
    targets = deploy.add_subparsers(title="commands", required=True, metavar="COMMAND")
    kubernetes = targets.add_parser("kubernetes", help="write the manifest of a run on Kubernetes")
    _add_config_arguments(kubernetes, "YAML file; relative paths in it are relative to the volume")
    for flag, metavar, description in (
        ("kind", "KIND", "pytorchjob, trainjob (Kubeflow Trainer v2) or rayjob; default: pytorchjob"),
        ("image", "IMAGE", "image with registry and tag; required"),
        ("pvc", "NAME", "PersistentVolumeClaim with models, data and checkpoints; required"),
        ("nodes", "N", "number of machines; default: 1"),
        ("gpus-per-node", "M", "GPUs, and processes, of each machine; default: 8"),
        ("efa-per-node", "M", "EFA adapters of each machine; default: 0"),
        ("name", "NAME", "name of the job; default: distill"),
        ("namespace", "NAME", "namespace; default: that of kubectl"),
        ("mount-path", "PATH", "where the volume is mounted, and the working directory; default: /fsx"),
        ("instance-type", "TYPE", "type of the machines, such as ml.p5en.48xlarge; default: any"),
        ("secret", "NAME", "Secret with HF_TOKEN and WANDB_API_KEY, if it exists; default: hf-token"),
        ("shm-size", "SIZE", "maximum size of /dev/shm, such as 64Gi; default: half of the memory"),
        ("max-restarts", "N", "restarts after failures; default: 10"),
        ("grace-period", "SECONDS", "time to save in after SIGTERM; default: 600"),
        ("runtime", "NAME", "ClusterTrainingRuntime of a trainjob; default: torch-distributed"),
        ("user", "UID", "user and group id of the processes; default: 1000"),
    ):
        kubernetes.add_argument(f"--{flag}", metavar=metavar, help=description)
    for flag, description in (("node-selector", "label that the nodes must have"), ("annotation", "of the job")):
        kubernetes.add_argument(
            f"--{flag}", action="append", default=[], metavar="KEY=VALUE", help=f"{description}; may be repeated"
        )
    kubernetes.add_argument("--output", type=Path, metavar="FILE", help="file to write; default: standard output")
    kubernetes.set_defaults(run=_deploy_kubernetes)


def _add_config_arguments(
    parser: argparse.ArgumentParser, description: str = "YAML file", *, optional: bool = False
) -> None:
    """Add the arguments that select a configuration; ``_load`` reads them."""
    if optional:
        parser.add_argument("config", type=Path, nargs="?", help=description)
    else:
        parser.add_argument("config", type=Path, help=description)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the file")
    parser.add_argument(
        "--dialect", metavar="NAME", help="format of the file, such as limbeck, roll or nemo_rl; default: recognised"
    )


def _train(args: argparse.Namespace) -> int:
    from limbeck.launch.start import train_from_config

    return train_from_config(args.config, args.overrides, args.dialect)


def _serve_teacher(args: argparse.Namespace) -> int:
    config = _load_and_print_notices(args)

    from limbeck.teachers.service import serve_teacher

    serve_teacher(config, args.name, lambda line: print(line, flush=True))
    return 0


def _check(args: argparse.Namespace) -> int:
    loaded = _load(args)
    for notice in loaded.notices:
        print(f"note: {notice}", file=sys.stderr)

    from limbeck.launch.preflight import check_run
    from limbeck.models.logs import configure_logging

    configure_logging()
    problems = check_run(loaded.config)
    for problem in problems:
        print(f"limbeck: {loaded.with_origin(problem)}", file=sys.stderr)
    return USER_MISTAKE if problems else 0


def _load(args: argparse.Namespace) -> LoadedConfig:
    """Load the configuration of the command line and set its environment variables."""
    from limbeck.config import load_config

    loaded = load_config(args.config, args.overrides, args.dialect)
    os.environ.update(loaded.config.environment)
    return loaded


def _load_and_print_notices(args: argparse.Namespace) -> DistillConfig:
    loaded = _load(args)
    for notice in loaded.notices:
        print(f"note: {notice}", file=sys.stderr)
    return loaded.config


def _config(args: argparse.Namespace) -> int:
    from limbeck.config import render_config, render_schema

    if args.schema:
        print(render_schema())
        return 0
    if args.config is None:
        raise LimbeckError("limbeck config needs an argument; give a YAML file, or --schema.")
    loaded = _load(args)
    if loaded.config.kd_objective_kwargs or loaded.config.rollout:  # checked by the divergence itself
        import torch

        from limbeck.train.build.objective import make_objective, make_objectives

        make_objective(loaded.config, torch.device("cpu"))
        make_objectives(loaded.config, torch.device("cpu"))
    print(f"# dialect: {loaded.dialect}")
    print(render_config(loaded), end="")
    for notice in loaded.notices:
        print(f"note: {notice}", file=sys.stderr)
    return 0


def _data_show(args: argparse.Namespace) -> int:
    config = _load(args).config

    from rich.console import Console

    from limbeck.data import make_encoder
    from limbeck.data.show import find_row, print_row
    from limbeck.train.build.data import (
        make_tokenizer,
        make_translator,
        teacher_tokenizer,
        token_settings,
    )
    from limbeck.train.build.sources import named_sources, training_sources

    encoder = make_encoder(make_tokenizer(config), token_settings(config))
    sources = named_sources(config, args.file) if args.file else training_sources(config)
    if args.row < 0:
        raise LimbeckError(f"--row {args.row} is negative; give the index of a row, from 0.")
    found = find_row(sources, args.row, encoder)
    teacher = translator = None
    if config.has_teacher and config.cross_tokenizer == "off":
        teacher = teacher_tokenizer(config.teacher)
    elif config.has_teacher:
        translator = make_translator(config, encoder.tokenizer)
    print_row(Console(highlight=False), found, encoder, teacher=teacher, translator=translator, ids=args.ids)
    return 0


def _data_cache(args: argparse.Namespace) -> int:
    config = _load_and_print_notices(args)

    from limbeck.data import mix
    from limbeck.train.build.data import (
        cache_folder,
        make_tokenizer,
        mixture_settings,
        prepare_examples,
        prepare_validation,
    )

    tokenizer = make_tokenizer(config)
    train, report = prepare_examples(config, tokenizer)
    print(f"training: {report}")
    if (mixture := mix(train, report, mixture_settings(config), config.data_seed)) is not None:
        print(f"mixture: {mixture}")
    if (held_out := prepare_validation(config, tokenizer)) is not None:
        print(f"validation: {held_out[1]}")
    print(f"cache: {cache_folder(config)}")
    return 0


def _plan(args: argparse.Namespace) -> int:
    config = _load_and_print_notices(args)

    from rich.console import Console

    from limbeck.models.logs import configure_logging
    from limbeck.plan.estimate import make_plan, refusal
    from limbeck.plan.gpus import find_gpu
    from limbeck.plan.render import print_plan

    configure_logging()
    plan = make_plan(config, args.nodes, args.gpus_per_node, find_gpu(args.gpu))
    for notice in plan.notices:
        print(f"note: {notice}", file=sys.stderr)
    if args.json:
        print(json.dumps(plan.as_dict(), indent=1))
    else:
        print_plan(Console(highlight=False), plan)
    if not plan.fits:
        raise refusal(plan)
    return 0


def _deploy_kubernetes(args: argparse.Namespace) -> int:
    from limbeck.deploy.job import job_from_flags
    from limbeck.deploy.manifest import make_manifest

    text, notices = make_manifest(
        args.kind or "pytorchjob", job_from_flags(vars(args)), args.config, args.overrides, args.dialect
    )
    for notice in notices:
        print(f"note: {notice}", file=sys.stderr)
    if args.output is None:
        print(text, end="")
        return 0
    if args.output.exists() and args.output.samefile(args.config):
        raise LimbeckError(f"--output {args.output} is the configuration itself; name another file.")
    try:
        args.output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise LimbeckError(
            f"--output {args.output} cannot be written ({error.strerror}); name another file."
        ) from error
    print(args.output)
    return 0


def _spectrum(args: argparse.Namespace) -> int:
    import torch
    from rich.console import Console
    from rich.status import Status

    from limbeck.models import ModelSource, load_model
    from limbeck.models.load import checkpoint_dtype
    from limbeck.models.logs import configure_logging
    from limbeck.models.spectrum import rank_matrices, render_yaml

    configure_logging()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = ModelSource(args.model, "student", revision=args.revision)
    model = load_model(source, checkpoint_dtype(source))
    with Status("", console=Console(stderr=True)) as status:
        ranked = rank_matrices(model, args.top_percent, device, status.update)
    args.output.write_text(
        render_yaml(ranked, f"limbeck spectrum {args.model} --top-percent {args.top_percent:g}"), encoding="utf-8"
    )
    selected = {one.name for one in ranked if one.selected}
    trained = sum(parameter.numel() for name, parameter in model.named_parameters() if name in selected)
    total = sum(parameter.numel() for parameter in model.parameters())
    print(f"{args.output}: {len(selected)} of {len(ranked)} matrices, {trained:,} of {total:,} parameters")
    return 0


def _demo(args: argparse.Namespace) -> int:
    from limbeck.demo.run import run_demo

    run_demo(args.output, seed=args.seed)
    return 0


def _push(args: argparse.Namespace) -> int:
    from limbeck.train.push import push_run

    address = push_run(
        args.run_folder, args.repo_id, checkpoint=args.checkpoint, private=args.private, branch=args.branch
    )
    print(f"uploaded to {address}")
    return 0


def _report(args: argparse.Namespace) -> int:
    from limbeck.report import load_runs, write_report

    runs = load_runs(args.runs)
    path = args.output or args.runs[0] / "report.html"
    print(write_report(runs, path, title=" and ".join(run.name for run in runs)))
    return 0
