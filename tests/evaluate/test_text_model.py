"""``limbeck chat`` and ``limbeck generate``: what models read, and when they stop."""

import io

import pytest

from limbeck import DistillPipeline
from limbeck.cli import main
from limbeck.errors import LimbeckError
from limbeck.evaluate.text_model import TextModel
from limbeck.rollout.generator import SamplingParams


@pytest.fixture(scope="module")
def model(seven):
    return TextModel.load(str(seven), device="cpu")


def test_an_answer_ends_with_the_end_of_the_template(model, capsys):
    sampling = SamplingParams(max_tokens=5, temperature=0.0)
    text = model.prompt([{"role": "user", "content": "How many?"}])
    assert text == "<|user|>How many?<|end|><|assistant|>"
    (completion,) = model.write([text], sampling)
    assert (model.decode(completion), completion.finished, len(completion.token_ids)) == ("7", True, 2)
    assert model.stream(text, sampling) == "7"
    assert capsys.readouterr().out == "7\n"
    with pytest.raises(LimbeckError, match="seven reads 256; write a shorter one"):
        model.stream("7" * 256, sampling)


def test_a_student_reads_what_its_run_wrote(configure, tmp_path, capsys):
    keys = {
        "student.data_args.default_system": "Be brief.",
        "student.data_args.template": "chatml",
        "sequence_length": 128,
    }
    result = DistillPipeline(configure(max_steps=2, save_steps=1, **keys)).run()
    out = tmp_path / "out"
    student = TextModel.load(str(out), device="cpu")
    assert (student.name, student.run, student.source.name_or_path) == ("checkpoint-2", out, str(result.student))
    text = student.prompt([{"role": "user", "content": "Why?"}])
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    earlier = TextModel.load(str(out), "checkpoint-1", device="cpu")
    assert (earlier.name, earlier.run) == ("checkpoint-1", out)
    assert TextModel.load(str(out / "checkpoint-1"), device="cpu").run == out
    assert main(["generate", str(out), "--checkpoint", "checkpoint-9", "--prompt", "x"]) == 2
    assert f"there is no checkpoint checkpoint-9 in {out}" in capsys.readouterr().err


def test_generate_prints_the_answers_of_both_models(seven, assets, monkeypatch, capsys):
    greedy = ["--max-new-tokens", "4", "--device", "cpu"]
    assert main(["generate", str(seven), *greedy, "--prompt", "How many?", "--prompt", "And now?"]) == 0
    assert capsys.readouterr().out == "7\n7\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("How many?\n\n"))
    assert main(["generate", str(seven), *greedy, "--beside", str(assets / "teacher")]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("seven: 7\nteacher: ")
    assert main(["generate", str(seven), *greedy, "--raw", "--prompt", "How many?"]) == 0
    assert capsys.readouterr().out == "0000\n"
    assert main(["generate", str(seven), "--checkpoint", "best", "--prompt", "x"]) == 2
    assert "--checkpoint best needs a run" in capsys.readouterr().err
    assert main(["generate", str(seven), "--top-p", "0", "--prompt", "x"]) == 2
    assert "--top-p 0.0 is impossible; it must be above 0 and at most 1" in capsys.readouterr().err


def test_a_conversation_has_the_earlier_turns(seven, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n/reset\nthree\n/exit\nfour\n"))
    read = []
    stream = TextModel.stream
    monkeypatch.setattr(
        TextModel, "stream", lambda model, text, sampling: read.append(text) or stream(model, text, sampling)
    )
    assert main(["chat", str(seven), "--system", "Count.", "--temperature", "0", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out == "seven: 7\n" * 3
    system = "<|system|>Count.<|end|>"
    assert read == [
        f"{system}<|user|>one<|end|><|assistant|>",
        f"{system}<|user|>one<|end|><|assistant|>7<|end|><|user|>two<|end|><|assistant|>",
        f"{system}<|user|>three<|end|><|assistant|>",
    ]
