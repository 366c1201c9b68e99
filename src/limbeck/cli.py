"""The command ``limbeck``. Parses words and calls one function; heavy imports wait until a command needs them."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from limbeck.errors import LimbeckError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; a user's mistake is one sentence on stderr and status 2."""
    args = _parser().parse_args(arguments)
    try:
        return int(args.run(args))
    except LimbeckError as error:
        print(f"limbeck: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="limbeck", description="Distil a large language model into a small one.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="distil a student as a YAML file says")
    train.add_argument("config", type=Path, help="YAML file")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="settings that overrule the file")
    train.set_defaults(run=lambda args: train_from_config(args.config, args.overrides))

    config = commands.add_parser(
        "config", help="print a configuration with every default and where each value came from"
    )
    config.add_argument("config", type=Path, nargs="?", help="YAML file")
    config.add_argument("overrides", nargs="*", metavar="key=value")
    config.add_argument("--schema", action="store_true", help="document every key instead")
    config.set_defaults(run=_config)

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
    if main_process:
        for notice in loaded.notices:
            print(f"note: {notice}", file=sys.stderr)
    os.environ.update(config.environment)
    ranks = len(config.device_mapping or [0])
    launched = "WORLD_SIZE" in os.environ
    if launched and config.device_mapping and int(os.environ["WORLD_SIZE"]) != ranks:
        raise LimbeckError(
            f"student.device_mapping names {ranks} devices but the launcher started {os.environ['WORLD_SIZE']} processes; "
            "start as many, or leave device_mapping out."
        )
    if config.num_nodes > 1 and not launched:
        raise LimbeckError(
            f"num_nodes = {config.num_nodes}: start one `torchrun --nnodes {config.num_nodes} … -m limbeck train …` per "
            "machine; limbeck train itself starts processes on one machine only."
        )
    if ranks > 1 and not launched:
        return _launch(config.device_mapping or [], config_file, overrides)

    from limbeck.pipeline.distill import DistillPipeline

    result = DistillPipeline(config).run()
    if main_process:
        print(f"student: {result.student}")
    return 128 + result.stopped_by if result.stopped_by else 0


def _launch(devices: Sequence[int], config_file: Path, overrides: Sequence[str]) -> int:
    import torch

    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // len(devices))))
    if torch.cuda.is_available():
        if max(devices) >= torch.cuda.device_count():
            raise LimbeckError(
                f"student.device_mapping names device {max(devices)}, but this machine has {torch.cuda.device_count()} GPUs "
                "(numbered from 0); name devices that exist."
            )
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, devices))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(len(devices)),
        "-m", "limbeck", "train", str(config_file), *overrides,
    ]  # fmt: skip
    process = subprocess.Popen(command, env=environment)
    while True:
        try:
            return process.wait()
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
    print(render_config(loaded), end="")
    for notice in loaded.notices:
        print(f"note: {notice}", file=sys.stderr)
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
