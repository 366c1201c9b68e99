"""A disk that is full ends a run with one error, and leaves the last whole checkpoint and nothing half-written."""

import resource
from contextlib import contextmanager
from pathlib import Path

import pytest

from limbeck import DistillPipeline, LimbeckError
from limbeck.train.checkpoint import find_damage, list_checkpoints

SHORT = {"eval_steps": 0, "max_steps": 2, "validation": None}


@contextmanager
def files_of_at_most(size: int):
    """Writing more is an error of the operating system, as with a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("begun", [True, False])
def test_a_disk_that_fills_up_while_saving(configure, tmp_path, begun):
    out, steps = tmp_path / "out", 4 if begun else 2
    DistillPipeline(configure(**SHORT, output_dir=str(out if begun else tmp_path / "fills the token cache"))).run()
    config = configure(**{**SHORT, "max_steps": steps}, resume_from_checkpoint=True)
    with (
        files_of_at_most(20_000),
        pytest.raises(
            LimbeckError,
            match=rf"checkpoint-{steps} could not be written .*File too large.*"
            + ("checkpoint-2 is complete" if begun else "there is none before it"),
        ),
    ):
        DistillPipeline(config).run()
    assert [path.name for path in list_checkpoints(out)] == (["checkpoint-2"] if begun else [])
    assert all(find_damage(path) is None for path in list_checkpoints(out))
    assert not [path for path in out.iterdir() if path.name.startswith(".")], "neither a half-written folder nor a lock"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a file that is always full")
def test_a_disk_that_is_full_while_logging(configure, tmp_path):
    DistillPipeline(configure(**SHORT)).run()
    log = tmp_path / "out" / "metrics.jsonl"
    log.unlink()
    log.symlink_to("/dev/full")
    with pytest.raises(LimbeckError, match=r"metrics of step 3 cannot be written: No space left.*checkpoint-2"):
        DistillPipeline(configure(**{**SHORT, "max_steps": 4}, resume_from_checkpoint=True)).run()
    assert [path.name for path in list_checkpoints(tmp_path / "out")] == ["checkpoint-2"]
