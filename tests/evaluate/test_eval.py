"""``limbeck eval``: accuracy on questions, tasks of lm-eval, and their results beside a run."""

import json
import sys

import pytest
from tiny import make_data

from limbeck import DistillPipeline
from limbeck.cli import main


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "sums.jsonl"
    rows = [("3 + 4?", "The sum is #### 7"), ("5 + 2?", "7.0"), ("1 + 1?", "2"), ("2 + 2?", "four")]
    path.write_text("".join(json.dumps({"question": one, "answer": other}) + "\n" for one, other in rows))
    return path


def test_accuracy_is_the_share_of_right_answers(seven, questions, tmp_path, capsys):
    command = ["eval", str(seven), "--device", "cpu", "--data", str(questions), "--max-new-tokens", "4"]
    assert main([*command, "--output", str(tmp_path / "results")]) == 0
    assert "accuracy 0.5" in capsys.readouterr().out
    saved = json.loads((tmp_path / "results" / "sums--seven.json").read_text())
    assert saved["metrics"] == {"accuracy": 0.5, "unscored_share": 0.0, "truncated_share": 0.0, "mean_length": 2.0}
    assert saved["settings"]["questions"] == 4
    lines = (tmp_path / "results" / "sums--seven.jsonl").read_text().splitlines()
    answers = [json.loads(line) for line in lines]
    assert [answer["correct"] for answer in answers] == [True, True, False, False]
    assert answers[0]["answer"] == "7" and answers[0]["prompt"].endswith("<|assistant|>")
    assert main([*command, "--output", str(tmp_path / "results"), "--limit", "2", "--samples", "3"]) == 0
    assert "accuracy 1 " in capsys.readouterr().out
    assert len((tmp_path / "results" / "sums--seven.jsonl").read_text().splitlines()) == 6


def test_conversations_are_questions_up_to_their_last_answer(seven, tmp_path, capsys):
    chat = tmp_path / "chat.jsonl"
    turns = [("user", "one?"), ("assistant", "1"), ("user", "seven?"), ("assistant", "7")]
    messages = [{"role": role, "content": text} for role, text in turns]
    chat.write_text(json.dumps({"messages": messages}) + "\n" + json.dumps({"messages": messages[:2]}) + "\n")
    assert main(["eval", str(seven), "--device", "cpu", "--data", str(chat), "--output", str(tmp_path)]) == 0
    assert "accuracy 0.5" in capsys.readouterr().out
    first = json.loads((tmp_path / "chat--seven.jsonl").read_text().splitlines()[0])
    assert first["prompt"].endswith("<|user|>seven?<|end|><|assistant|>") and first["reference"] == "7"
    chat.write_text(json.dumps({"messages": messages[:3]}) + "\n")
    assert main(["eval", str(seven), "--device", "cpu", "--data", str(chat)]) == 2
    assert f"{chat}:1 ends without an answer" in capsys.readouterr().err


def test_the_report_of_a_run_shows_its_evaluations(configure, seven, questions, tmp_path):
    DistillPipeline(configure(max_steps=1)).run()
    out = tmp_path / "out"
    options = ["--device", "cpu", "--data", str(questions), "--max-new-tokens", "4"]
    assert main(["eval", str(out), "--beside", str(seven), *options]) == 0
    assert sorted(path.name for path in (out / "eval").glob("*.json")) == [
        "sums--checkpoint-1.json",
        "sums--seven.json",
    ]
    (out / "eval" / "mine.json").write_text("[1]")
    assert main(["report", str(out)]) == 0
    page = (out / "report.html").read_text()
    table = page[page.index("<h2>Evaluation</h2>") : page.index("<h2>Learning</h2>")]
    assert "sums: accuracy" in table and "4 questions, verifier exact" in table
    assert "checkpoint-1" in table and "50.0%" in table


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "nothing to measure; give --data FILE, --tasks NAMES, or both"),
        (["--data", "nowhere.jsonl"], "The data file nowhere.jsonl does not exist"),
        (["--data", "nowhere.jsonl", "--samples", "0"], "--samples 0 is impossible; it must be 1 or more"),
    ],
)
def test_mistakes_are_one_sentence(seven, capsys, arguments, sentence):
    assert main(["eval", str(seven), *arguments]) == 2
    shown = capsys.readouterr().err
    assert sentence in shown and shown.count("\n") == 1


def test_tasks_of_lm_eval(seven, tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = make_data(tmp_path / "rows.jsonl", 4)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "choice.yaml").write_text(
        f"{{task: choice, dataset_path: json, dataset_kwargs: {{data_files: {{test: {rows}}}}}, test_split: test, "
        "output_type: multiple_choice, doc_to_text: '{{question}}', doc_to_choice: ['7', '3'], doc_to_target: 0, "
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]}"
    )
    command = [
        "eval",
        str(seven),
        "--device",
        "cpu",
        "--output",
        str(tmp_path),
        "--include-path",
        str(tmp_path / "tasks"),
    ]
    assert main([*command, "--tasks", "choice", "--apply-chat-template"]) == 0
    saved = json.loads((tmp_path / "choice--seven.json").read_text())
    assert saved["metrics"]["acc"] == 1.0 and saved["settings"]["library"] == "lm-eval"
    assert main([*command, "--tasks", "chioce"]) == 2
    assert "lm-eval has no task chioce" in capsys.readouterr().err


def test_tasks_need_lm_eval(seven, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", str(seven), "--device", "cpu", "--tasks", "gsm8k"]) == 2
    assert "install it with: pip install 'limbeck[eval]'" in capsys.readouterr().err
