"""The command ``limbeck``. Parses words and calls one function; heavy imports wait until a command needs them."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from limbeck.errors import LimbeckError, Stopped

if TYPE_CHECKING:
    from limbeck.config import DistillConfig

USER_MISTAKE = 2
_STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
_STARTED_HERE = "LIMBECK_STARTED_HERE"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; a user's mistake is one sentence on stderr and status 2."""
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    if rest and hasattr(args, "overrides") and all(_is_override(word) for word in rest):
        args.overrides = [*args.overrides, *rest]  # argparse takes no key=value or ~key behind an option
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
    except BrokenPipeError:  # as in `limbeck data show … | head`; the interpreter must not flush into the pipe either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _is_override(word: str) -> bool:
    return word.startswith("~") or ("=" in word and not word.startswith("-"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="limbeck", description="Distil a large language model into a small one.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="distil a student as a YAML file says")
    train.add_argument("config", type=Path, help="YAML file")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="settings that overrule the file")
    train.set_defaults(run=lambda args: train_from_config(args.config, args.overrides))

    serve = commands.add_parser("serve-teacher", help="keep a teacher for several runs, until Ctrl-C")
    serve.add_argument("config", type=Path, help="YAML file of one of the runs")
    serve.add_argument("overrides", nargs="*", metavar="key=value", help="settings that overrule the file")
    serve.add_argument("--name", help="what runs call it by; default teacher.service, else teacher")
    serve.set_defaults(run=_serve_teacher)

    cluster = commands.add_parser("cluster", help="see whether a run fits the machines, before anything is loaded")
    checks = cluster.add_subparsers(title="commands", required=True, metavar="COMMAND")
    check = checks.add_parser("check", help="placement, package versions, model memory and layouts of a configuration")
    check.add_argument("config", type=Path, help="YAML file")
    check.add_argument("overrides", nargs="*", metavar="key=value", help="settings that overrule the file")
    check.set_defaults(run=_cluster_check)

    config = commands.add_parser(
        "config", help="print a configuration with every default and where each value came from"
    )
    config.add_argument("config", type=Path, nargs="?", help="YAML file")
    config.add_argument("overrides", nargs="*", metavar="key=value")
    config.add_argument("--schema", action="store_true", help="document every key instead")
    config.set_defaults(run=_config)

    data = commands.add_parser("data", help="see what is learned of a row, or tokenise ahead of time")
    doings = data.add_subparsers(title="commands", required=True, metavar="COMMAND")
    show = doings.add_parser("show", help="print a row token by token, as the student and as the teacher see it")
    show.add_argument("config", type=Path, help="YAML file")
    show.add_argument("overrides", nargs="*", metavar="key=value", help="settings that overrule the file")
    show.add_argument("--row", type=int, default=0, metavar="N", help="which row of the training files, from 0")
    show.add_argument("--file", metavar="FILE", help="look into this file instead of the training files")
    show.add_argument("--ids", action="store_true", help="print token ids too")
    show.set_defaults(run=_data_show)
    cache = doings.add_parser("cache", help="read, check and tokenise the data now, so that training starts at once")
    cache.add_argument("config", type=Path, help="YAML file")
    cache.add_argument("overrides", nargs="*", metavar="key=value", help="settings that overrule the file")
    cache.set_defaults(run=_data_cache)

    plan = commands.add_parser("plan", help="tell memory, traffic and time of a run on GPUs that are not here")
    plan.add_argument("config", type=Path, help="YAML file")
    plan.add_argument("overrides", nargs="*", metavar="key=value", help="settings that overrule the file")
    plan.add_argument("--nodes", type=int, default=1, metavar="N")
    plan.add_argument("--gpus-per-node", type=int, default=8, metavar="M")
    plan.add_argument("--gpu", default="H100", help="such as H100, H200, A100, L40S or B200")
    plan.add_argument("--json", action="store_true", help="print bytes, FLOPs and seconds for machines")
    plan.set_defaults(run=_plan)

    demo = commands.add_parser("demo", help="see a student get better than training without a teacher makes it")
    demo.add_argument("--output", type=Path, default=Path("limbeck-demo"), help="folder for everything it makes")
    demo.add_argument("--seed", type=int, default=0)
    demo.set_defaults(run=_demo)

    report = commands.add_parser("report", help="draw a run as one HTML page")
    report.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="output folder of a run; several are compared"
    )
    report.add_argument("--output", type=Path, help="the page; default RUN/report.html")
    report.set_defaults(run=_report)
    return parser


def train_from_config(config_file: Path, overrides: Sequence[str]) -> int:
    """Run the pipeline that a YAML file describes; the one function behind every front door. Returns the exit status.

    A ``device_mapping`` of several devices starts that many processes on this machine, unless torchrun already has.
    """
    from limbeck.config import load_config

    loaded = load_config(config_file, overrides)
    config = loaded.config
    main_process = int(os.environ.get("RANK", "0")) == 0
    if main_process and not os.environ.get(_STARTED_HERE):
        for notice in loaded.notices:
            print(f"note: {notice}", file=sys.stderr)
    os.environ.update(config.environment)  # before torch is imported, which reads some of it once
    devices = config.device_mapping or []
    launched = "WORLD_SIZE" in os.environ
    if launched and devices and int(os.environ["WORLD_SIZE"]) != len(devices):
        raise LimbeckError(
            f"student.device_mapping names {len(devices)} devices, but the launcher started {os.environ['WORLD_SIZE']} "
            "processes; start as many, or leave device_mapping out."
        )
    if config.needs_worker_groups and launched:
        raise LimbeckError(
            "the teacher is a service, or has other devices than the student, so Ray starts the processes; run plain "
            "`limbeck train` instead of a launcher."
        )
    if config.needs_worker_groups or (config.num_nodes > 1 and not launched):
        return _train_on_cluster(config)
    if len(devices) > 1 and not launched:
        return _launch(len(devices), config_file, overrides)
    if devices and config.num_nodes == 1:  # on several machines each process takes the GPU of its local rank
        os.environ["CUDA_VISIBLE_DEVICES"] = _visible(devices, os.environ.get("CUDA_VISIBLE_DEVICES"))

    from limbeck.train.loop import DistillPipeline

    result = DistillPipeline(config).run()
    if main_process:
        print(f"student: {result.student}")
    return 128 + result.stopped_by if result.stopped_by else 0


def _train_on_cluster(config: DistillConfig) -> int:
    from limbeck.launch.on_ray import run_on_ray

    result = run_on_ray(config, lambda line: print(line, flush=True))
    print(f"student: {result.student}")
    return 128 + result.stopped_by if result.stopped_by else 0


def _serve_teacher(args: argparse.Namespace) -> int:
    config = _settled(args)

    from limbeck.teachers.service import serve_teacher

    serve_teacher(config, args.name, lambda line: print(line, flush=True))
    return 0


def _cluster_check(args: argparse.Namespace) -> int:
    config = _settled(args)

    from limbeck.launch.preflight import check_cluster

    problems = check_cluster(config)
    for problem in problems:
        print(f"limbeck: {problem}", file=sys.stderr)
    if problems:
        return USER_MISTAKE
    print("fits")
    return 0


def _settled(args: argparse.Namespace) -> DistillConfig:
    """The configuration that the command line names; its notices are printed, its environment is set."""
    from limbeck.config import load_config

    loaded = load_config(args.config, args.overrides)
    for notice in loaded.notices:
        print(f"note: {notice}", file=sys.stderr)
    os.environ.update(loaded.config.environment)
    return loaded.config


def _visible(devices: Sequence[int], allowed: str | None) -> str:
    """The value of CUDA_VISIBLE_DEVICES under which ``devices`` count from 0, inside what a scheduler ``allowed``."""
    if allowed is None:
        return ",".join(map(str, devices))
    names = [name.strip() for name in allowed.split(",") if name.strip()]
    if names and max(devices) >= len(names):
        raise LimbeckError(
            f"student.device_mapping names device {max(devices)}, but CUDA_VISIBLE_DEVICES = {allowed} leaves only "
            f"{len(names)} (numbered from 0); name devices that exist."
        )
    return ",".join(names[device] for device in devices) if names else allowed


def _launch(ranks: int, config_file: Path, overrides: Sequence[str]) -> int:
    """Run this command once per rank on this machine. When one fails the others are stopped; the worst status is returned."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {**os.environ, _STARTED_HERE: "1", "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    command = [sys.executable, "-m", "limbeck", "train", str(config_file), *overrides]
    with tempfile.TemporaryFile("w+") as others:
        processes = [
            subprocess.Popen(
                command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=others if rank else None
            )
            for rank in range(ranks)
        ]

        def pass_on(number: int, frame: object) -> None:
            for process in processes:
                process.terminate()

        before = signal.signal(signal.SIGTERM, pass_on)
        _wait(processes)
        signal.signal(signal.SIGTERM, before)
        # What the others say after the main rank's sentence is only that it is gone.
        if processes[0].returncode != USER_MISTAKE and any(process.returncode for process in processes):
            others.seek(0)
            sys.stderr.write("".join(others.readlines()[-40:]))
    codes = [process.returncode for process in processes]
    worst = next((code for code in codes if code), 0)
    return 128 - worst if worst < 0 else worst


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    while any(process.poll() is None for process in processes):
        try:
            time.sleep(0.2)
            # A rank that stopped as it was asked to has company in that; any other end but a good one ends the rest.
            if any(process.poll() not in (None, 0, *_STOPPED) for process in processes):
                # The main rank may be the one with something to say; give it a moment before it is stopped too.
                time.sleep(2)
                for process in processes:
                    process.terminate()
                for process in processes:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(60)
                    process.kill()
                    process.wait()
        except KeyboardInterrupt:
            continue  # the processes have had the same Ctrl-C and are saving


def _config(args: argparse.Namespace) -> int:
    from limbeck.config import load_config, render_config, render_schema

    if args.schema:
        print(render_schema())
        return 0
    if args.config is None:
        raise LimbeckError("limbeck config needs a YAML file, or --schema.")
    loaded = load_config(args.config, args.overrides)
    if loaded.config.kd_objective_kwargs:  # whose meaning only the divergence itself knows
        import torch

        from limbeck.train.build.objective import make_objective

        make_objective(loaded.config, torch.device("cpu"))
    print(render_config(loaded), end="")
    for notice in loaded.notices:
        print(f"note: {notice}", file=sys.stderr)
    return 0


def _data_show(args: argparse.Namespace) -> int:
    from limbeck.config import load_config

    config = load_config(args.config, args.overrides).config
    os.environ.update(config.environment)

    from rich.console import Console

    from limbeck.data import make_encoder
    from limbeck.data.show import find_row, print_row
    from limbeck.train.build.data import (
        make_tokenizer,
        make_translator,
        teacher_tokenizer,
        token_settings,
    )
    from limbeck.train.build.sources import named_source, training_sources

    encoder = make_encoder(make_tokenizer(config), token_settings(config))
    sources = [named_source(config, args.file)] if args.file else training_sources(config)
    if args.row < 0:
        raise LimbeckError(f"--row {args.row} is no row; rows are counted from 0.")
    found = find_row(sources, args.row, encoder)
    teacher = translator = None
    if config.has_teacher and config.cross_tokenizer == "off":
        teacher = teacher_tokenizer(config.teacher)
    elif config.has_teacher:
        translator = make_translator(config, encoder.tokenizer)
    print_row(Console(highlight=False), found, encoder, teacher=teacher, translator=translator, ids=args.ids)
    return 0


def _data_cache(args: argparse.Namespace) -> int:
    config = _settled(args)

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
    config = _settled(args)

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


def _demo(args: argparse.Namespace) -> int:
    from limbeck.demo.run import run_demo

    run_demo(args.output, seed=args.seed)
    return 0


def _report(args: argparse.Namespace) -> int:
    from limbeck.report import load_run, write_report

    runs = [load_run(folder) for folder in args.runs]
    path = args.output or args.runs[0] / "report.html"
    print(write_report(runs, path, title=" and ".join(run.name for run in runs)))
    return 0
