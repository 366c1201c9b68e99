"""Uploads a trained student to the Hugging Face hub with ``huggingface_hub``.

The token comes from HF_TOKEN or from the file that ``hf auth login`` writes. It is never a setting and never in a message.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import ValidationError

from limbeck.config.schema import HubConfig
from limbeck.errors import LimbeckError
from limbeck.train.checkpoint import MANIFEST, TRAINING, find_damage, list_checkpoints
from limbeck.train.model_card import model_card

_DELAYS = (2.0, 5.0, 15.0, 60.0)
"""Seconds before each repetition of an upload that failed. What has arrived is not sent again."""

_STALE = ["*.safetensors", "*.safetensors.index.json"]
"""Files of an earlier upload that are removed if this one does not have them: a model may be in fewer parts now."""


def check_token(hub: HubConfig) -> None:
    """Raise LimbeckError if a student could not be uploaded from this process, without using the network."""
    from huggingface_hub import constants, get_token

    if hub.repo_id is None:
        return
    if constants.is_offline_mode():
        raise LimbeckError(f"{_KEY} = {hub.repo_id} needs the network, and HF_HUB_OFFLINE is set; unset one of them.")
    if not get_token():
        raise LimbeckError(f"{_KEY} = {hub.repo_id} needs a token; set HF_TOKEN, or run `hf auth login` once.")


def make_repository(hub: HubConfig) -> None:
    """Make the repository and the branch unless they exist. Raises LimbeckError if that is not permitted."""
    if hub.repo_id is not None:
        with_retries(hub, "make the repository", lambda: _make_repository(hub))


def push_checkpoint(hub: HubConfig, checkpoint: Path) -> str:
    """Upload the student of a checkpoint, without the state for resuming, and a model card.

    A ``README.md`` in the checkpoint replaces the model card.

    Returns:
        The address of the repository.

    Raises:
        LimbeckError: if the upload fails, or if the checkpoint is damaged. The checkpoint is not changed in either case.
    """
    from huggingface_hub import HfApi

    assert hub.repo_id is not None
    check_token(hub)
    if (damage := find_damage(checkpoint)) is not None:
        raise LimbeckError(f"{checkpoint} is damaged ({damage}) and is not uploaded; choose another with --checkpoint.")
    with TemporaryDirectory() as name:
        staged = Path(name)
        for path in sorted(checkpoint.rglob("*")):
            relative = path.relative_to(checkpoint)
            if path.is_file() and relative.parts[0] not in (TRAINING, MANIFEST):
                (staged / relative).parent.mkdir(parents=True, exist_ok=True)
                (staged / relative).symlink_to(path.resolve())
        if not (staged / "README.md").exists():
            (staged / "README.md").write_text(model_card(checkpoint, hub.repo_id), encoding="utf-8")

        def upload() -> str:
            _make_repository(hub)
            HfApi().upload_folder(
                repo_id=str(hub.repo_id),
                folder_path=staged,
                revision=hub.branch,
                delete_patterns=_STALE,
                commit_message=f"Upload {checkpoint.resolve().name}",
            )
            return f"{HfApi().endpoint}/{hub.repo_id}" + (f"/tree/{hub.branch}" if hub.branch else "")

        return with_retries(hub, "upload the student", upload)


def push_run(
    run: Path,
    repo_id: str | None = None,
    *,
    checkpoint: str | None = None,
    private: bool | None = None,
    branch: str | None = None,
) -> str:
    """Upload the student of a finished run, or repeat a failed upload.

    Args:
        run: the output folder, or a checkpoint in it.
        repo_id: OWNER/NAME; by default that of the run's configuration.
        checkpoint: name of the checkpoint in the folder, such as ``best``; by default the newest.
        private, branch: by default those of the configuration.

    Returns:
        The address of the repository.

    Raises:
        LimbeckError: if there is no such checkpoint, no repository is known, or the upload fails.
    """
    folder = find_student(run, checkpoint)
    config = json.loads((folder / TRAINING / "state.json").read_text())["config"]
    given = {"repo_id": repo_id, "private": private, "branch": branch}
    configured = config["checkpoint_config"].get("save_to_hub", {})
    try:
        hub = HubConfig.model_validate(
            {**configured, **{key: value for key, value in given.items() if value is not None}}
        )
    except ValidationError as error:
        raise LimbeckError(f"--repo-id {repo_id} is not the name of a repository; write OWNER/NAME.") from error
    if hub.repo_id is None:
        raise LimbeckError(f"the run in {run} names no repository; give --repo-id OWNER/NAME.")
    return push_checkpoint(hub, folder)


def find_student(run: Path, checkpoint: str | None = None) -> Path:
    """The checkpoint that ``push_run`` uploads."""
    if checkpoint is None and (run / MANIFEST).is_file():
        return run
    folders = [run]
    if (run / "run.json").is_file():
        config = json.loads((run / "run.json").read_text())["config"]
        if elsewhere := config["checkpoint_config"]["output_dir"]:
            folders.append(Path(elsewhere))
    for folder in folders:
        if checkpoint is not None and (folder / checkpoint / MANIFEST).is_file():
            return folder / checkpoint
        if checkpoint is None and (existing := list_checkpoints(folder)):
            return existing[-1]
    wanted = f"checkpoint {checkpoint}" if checkpoint else "checkpoint"
    raise LimbeckError(
        f"there is no {wanted} in {run}; give the output folder of a run, or a checkpoint-<step> folder."
    )


_KEY = "checkpoint_config.save_to_hub.repo_id"


def _make_repository(hub: HubConfig) -> None:
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(str(hub.repo_id), private=hub.private, exist_ok=True)
    if hub.branch is not None:
        api.create_branch(str(hub.repo_id), branch=hub.branch, exist_ok=True)


def with_retries(hub: HubConfig, what: str, attempt: Callable[[], Any]) -> Any:
    """The result of ``attempt``, which is repeated after errors that may pass. Raises LimbeckError otherwise."""
    for delay in (*_DELAYS, None):
        try:
            return attempt()
        except Exception as error:  # huggingface_hub raises those of its HTTP library, of Xet and of the file system
            if delay is None or not _may_pass(error):
                raise LimbeckError(f"cannot {what} {hub.repo_id}: {_explain(error)}") from error
            time.sleep(delay)
    raise AssertionError


def _status(error: BaseException | None) -> int | None:
    while error is not None:
        response = getattr(error, "response", None)
        if response is not None:
            return int(response.status_code)
        error = error.__cause__
    return None


def _may_pass(error: Exception) -> bool:
    status = _status(error)
    return not isinstance(error, (ValueError, TypeError)) and (
        status is None or status in (408, 409, 429) or status >= 500
    )


def _explain(error: Exception) -> str:
    from huggingface_hub import get_token

    status = _status(error)
    if status in (401, 403):
        return f"the hub refuses the token (status {status}); use one with write access to that repository"
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text.replace(get_token() or "\0", "(token)")
