"""Which warnings reach the terminal, and in which form."""

import subprocess
import sys
import warnings

import pytest

from limbeck.models import load, logs


@pytest.mark.parametrize(
    ("module", "category", "shown"),
    [
        ("torch.distributed.c10d_logger", FutureWarning, False),
        ("deepspeed", DeprecationWarning, False),
        ("torch.cuda", UserWarning, True),
        ("torchvision", FutureWarning, True),
    ],
)
def test_what_libraries_will_change_is_not_for_users(monkeypatch, module, category, shown):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        logs.configure_logging()
        warnings.warn_explicit("Something.", category, "file.py", 7, module)
    assert len(caught) == shown


def test_limbecks_own_warnings_are_notes_of_one_line(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    logs.configure_logging()
    assert warnings.formatwarning("Something.", UserWarning, load.__file__, 7) == "note: Something.\n"
    assert "UserWarning: Something." in warnings.formatwarning("Something.", UserWarning, "/elsewhere.py", 7, "code")


@pytest.mark.slow
def test_an_installed_torchao_prints_nothing():
    pytest.importorskip("torchao")
    command = [sys.executable, "-c", "import limbeck.train.loop, transformers.quantizers"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
