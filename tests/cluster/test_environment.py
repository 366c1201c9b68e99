"""Environment variables of worker processes."""

from limbeck.cluster.environment import worker_environment


def test_settings_are_passed_on_and_tokens_are_not(monkeypatch):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HOME"):
        monkeypatch.setenv(name, "here")
    given = worker_environment({"HF_HOME": "mine"}, workers=2)
    assert given["HF_HOME"] == "mine"
    assert not [name for name in given if "TOKEN" in name]
