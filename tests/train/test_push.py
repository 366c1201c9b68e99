"""Uploads of the student to a local server that speaks the hub's HTTP API, with the real client."""

import hashlib
import json

import pytest
import yaml
from hub_server import serve_hub
from huggingface_hub import constants, snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer

from limbeck import DistillPipeline, LimbeckError
from limbeck.cli import main
from limbeck.train.checkpoint import find_damage, list_checkpoints
from limbeck.train.model_card import model_card

SHORT = {"max_steps": 2, "save_steps": 1, "eval_steps": 1}
REPO = {**SHORT, "checkpoint_config.save_to_hub.repo_id": "me/student"}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on this machine that the real client uses, with a token that may write. Large files are sent by HTTP."""
    with serve_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        address = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr("limbeck.train.push._DELAYS", (0.0, 0.0))
        monkeypatch.setenv("HF_TOKEN", "hf_writer")
        yield hub


@pytest.fixture
def trained(configure, tmp_path):
    """The output folder of a run without an upload."""
    DistillPipeline(configure(**SHORT)).run()
    return tmp_path / "out"


def test_a_run_uploads_its_student_which_loads_from_the_hub(hub, configure, tmp_path):
    DistillPipeline(configure(**REPO)).run()
    folder, files = tmp_path / "out" / "student", hub.files("me/student")
    local = {str(path.relative_to(folder)): path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert files.keys() == {*local, "README.md"} - {"manifest.json"}  # nothing of training/
    assert all(local[name] == content for name, content in files.items() if name != "README.md")
    assert hub.repositories["me/student"]["private"]
    downloaded = snapshot_download("me/student", cache_dir=tmp_path / "cache")
    assert AutoModelForCausalLM.from_pretrained(downloaded).config.hidden_size == 32
    assert AutoTokenizer.from_pretrained(downloaded).chat_template
    everything = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not any(b"hf_writer" in path.read_bytes() for path in everything), "a token is written nowhere"


def test_the_model_card_describes_the_run(trained):
    card = model_card(trained / "student", "me/student")
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata["library_name"] == "transformers"
    assert "base_model" not in metadata, "a local folder is no model on the hub"
    line = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    for text in ("# student", "student, distilled from teacher", "| data | rows.jsonl |", "0.5 · forward_kl",
                 "0.5 · cross-entropy", "| steps | 2 |", f"| validation loss | {line['val/loss']:.4f} |",
                 'from_pretrained("me/student")'):  # fmt: skip
        assert text in card, text
    assert str(trained.parent) not in card, "no local paths"
    first = model_card(list_checkpoints(trained)[0], "me/student")
    assert "| steps | 1 |" in first
    assert f"{line['val/loss']:.4f}" not in first, "the metrics of later steps are not the checkpoint's"


def test_hub_ids_are_metadata(trained):
    state = trained / "student" / "training" / "state.json"
    content = json.loads(state.read_text())
    content["config"]["student"]["model_args"]["model_name_or_path"] = "Qwen/Qwen2-1.5B"
    content["config"]["student"]["data_args"].update(file_name=None, sources=[{"hub": "owner/rows", "split": "train"}])
    state.write_text(json.dumps(content))
    metadata = yaml.safe_load(model_card(trained / "student", "me/student").split("---\n")[1])
    assert (metadata["base_model"], metadata["datasets"]) == ("Qwen/Qwen2-1.5B", ["owner/rows"])


def test_an_upload_is_repeated_and_sends_nothing_twice(hub, trained):
    hub.fail.append((r"POST /api/models/me/student/commit/main", [500]))
    assert main(["push", str(trained), "--repo-id", "me/student", "--public"]) == 0
    assert sum(request.startswith("PUT /objects/") for request in hub.requests) == 1
    assert sum("/commit/" in request for request in hub.requests) == 2
    assert not hub.repositories["me/student"]["private"]
    assert "model.safetensors" in hub.files("me/student")


def test_a_large_file_is_sent_in_parts(hub, trained):
    hub.part_size = 10_000
    local = (trained / "student" / "model.safetensors").read_bytes()
    hub.fail.append((r"PUT /objects/.*/2", [500]))
    assert main(["push", str(trained), "--repo-id", "me/student"]) == 0
    parts = -(-len(local) // hub.part_size)
    assert sum(request.startswith("PUT /objects/") for request in hub.requests) == parts + 1 > 3, "one is repeated"
    assert hub.files("me/student")["model.safetensors"] == local


def test_large_files_are_sent_with_xet_where_it_is_installed(hub, trained, tmp_path, monkeypatch):
    """As installed by default. The Xet client writes to a folder, which has its format, in place of a service."""
    hf_xet = pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "xet-cache"))
    hub.xet_store = tmp_path / "store"
    file = trained / "student" / "model.safetensors"
    hub.fail.append((r"POST /api/models/me/student/commit/main", [500]))

    def stored():
        return sorted((path.name, path.stat().st_size) for path in hub.xet_store.rglob("xorbs/default.*"))

    assert main(["push", str(trained), "--repo-id", "me/student"]) == 0
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert hub.files("me/student")["model.safetensors"] == f"{digest} {file.stat().st_size}".encode()
    assert not any("/objects/" in request for request in hub.requests), "nothing is sent by HTTP"
    (info,) = hf_xet.hash_files([str(file)])
    back = hf_xet.PyXetDownloadInfo(str(tmp_path / "back"), info.hash, info.file_size)
    hf_xet.download_files(
        [back], endpoint=f"local://{hub.xet_store}", token_info=None, token_refresher=None, progress_updater=None
    )
    assert (tmp_path / "back").read_bytes() == file.read_bytes()
    sent = stored()
    assert sent
    assert main(["push", str(trained), "--repo-id", "me/student", "--branch", "again"]) == 0
    assert stored() == sent, "what has arrived is not sent again"


def test_a_failed_upload_leaves_the_checkpoint_and_can_be_repeated(hub, configure, tmp_path, capsys):
    hub.fail.append((r"POST /api/models/me/student/commit/main", [500] * 20))
    with pytest.raises(
        LimbeckError, match=r"the student is saved in .*checkpoint-2, but not on the hub: cannot upload"
    ):
        DistillPipeline(configure(**REPO)).run()
    out = tmp_path / "out"
    assert [find_damage(path) for path in list_checkpoints(out)] == [None, None]
    hub.fail.clear()
    assert main(["push", str(out)]) == 0  # the repository is that of the configuration
    assert capsys.readouterr().out.splitlines()[-1] == f"uploaded to {hub.url}/me/student"
    assert hub.files("me/student")["model.safetensors"] == (out / "student" / "model.safetensors").read_bytes()


def test_a_token_in_the_hubs_answer_is_not_shown(hub, trained, capsys):
    hub.fail.append((r"POST /api/models/me/student/commit/main", [400]))
    assert main(["push", str(trained), "--repo-id", "me/student"]) == 2
    message = capsys.readouterr().err
    assert "cannot upload the student me/student" in message and "(token)" in message
    assert "hf_writer" not in message


def test_a_checkpoint_and_a_branch_can_be_chosen(hub, trained):
    push = ["push", str(trained), "--repo-id", "me/student"]
    assert main([*push, "--checkpoint", "checkpoint-1", "--branch", "first"]) == 0
    uploaded = hub.files("me/student", "first")
    assert uploaded["model.safetensors"] == (trained / "checkpoint-1" / "model.safetensors").read_bytes()
    assert hub.files("me/student", "main") == {}
    assert main(["push", str(trained / "checkpoint-2"), "--repo-id", "me/student", "--branch", "first"]) == 0
    uploaded = hub.files("me/student", "first")
    assert uploaded["model.safetensors"] == (trained / "checkpoint-2" / "model.safetensors").read_bytes()


def test_files_of_a_model_in_more_parts_are_removed(hub, trained):
    assert main(["push", str(trained), "--repo-id", "me/student"]) == 0
    files = hub.files("me/student")
    files |= {"model-00001-of-00002.safetensors": b"old", "model.safetensors.index.json": b"{}", "notes.md": b"mine"}
    assert main(["push", str(trained), "--repo-id", "me/student"]) == 0
    assert [name for name in files if "safetensors" in name] == ["model.safetensors"]
    assert files["notes.md"] == b"mine"


def test_the_users_own_readme_is_kept(hub, trained):
    (trained / "student" / "README.md").write_text("mine")
    assert main(["push", str(trained), "--repo-id", "me/student"]) == 0
    assert hub.files("me/student")["README.md"] == b"mine"


def test_a_missing_or_insufficient_token_stops_the_run_before_the_first_step(hub, configure, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(LimbeckError, match=r"save_to_hub.repo_id = me/student needs a token; set HF_TOKEN"):
        DistillPipeline(configure(**REPO)).run()
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    with pytest.raises(LimbeckError) as caught:
        DistillPipeline(configure(**REPO)).run()
    assert "cannot make the repository me/student: the hub refuses the token (status 403)" in str(caught.value)
    assert "hf_reader" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_uploaded_is_one_sentence(hub, configure, trained, capsys, monkeypatch):
    def refused(*arguments: str) -> str:
        assert main(["push", *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "names no repository; give --repo-id OWNER/NAME" in refused(str(trained))
    assert "--repo-id student is not the name of a repository" in refused(str(trained), "--repo-id", "student")
    assert "there is no checkpoint in" in refused(str(trained / "logs"))
    assert "there is no checkpoint best2 in" in refused(str(trained), "--checkpoint", "best2")
    named = (str(trained), "--repo-id", "me/student")
    monkeypatch.delenv("HF_TOKEN")
    assert "needs a token; set HF_TOKEN, or run `hf auth login` once." in refused(*named)
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(*named)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    (trained / "student" / "config.json").write_text("{}")
    assert "is damaged (config.json" in refused(*named)
    assert hub.requests == []
