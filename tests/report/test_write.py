import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.report import Answer, Level, ResultRow, ResultTable, Run, Sample, load_run, load_runs, write_report
from limbeck.report.charts import line_chart, number, percent
from limbeck.report.curves import Curve

VOID = {"meta", "br", "link", "img", "input", "hr"}


def rows(steps, distilled=True):
    for step in range(1, steps + 1):
        row = {"step": step, "train/loss": 5.0 / step, "train/train_student_loss": 6.0 / step, "train/tokens": 1000}
        row |= {"student/lr": 1e-3, "student/grad_norm": 1.0, "train/student_entropy": 2.0, "train/padding_share": 0.1}
        row |= {"train/tokens_per_second": 4000.0, "time/step": 0.25, "system/peak_memory_gb": 1.5}
        row |= {"time/data": 0.01, "time/teacher": 0.0, "time/student": 0.2, "time/optimizer": 0.01}
        if distilled:
            row |= {"train/train_distill_loss": 4.0 / step, "train/teacher_entropy": 1.0}
            row |= {"train/top1_agreement": 0.9, "time/teacher": 0.1}
        yield row
        if step % 10 == 0:
            row = {"step": step, "val/loss": 7.0 / step, "val/ce": 7.0 / step}
            yield row | ({"val/kd": 3.0 / step} if distilled else {})


def make(folder, name="distilled", steps=40, distilled=True, **facts):
    folder.mkdir(exist_ok=True)
    parameters = {"student": 412_800, "teacher": 1_723_680}
    run_facts = {"exp_name": name, "student": "models/small", "teacher": "models/large", "limbeck_version": "0.1.0"}
    run_facts |= {"parameters": parameters, "config": {"seed": 42}, "data": "400 rows read."} | facts
    (folder / "run.json").write_text(json.dumps(run_facts))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(steps, distilled)))
    return load_run(folder)


def report(tmp_path, runs, **more):
    return write_report(runs, tmp_path / "out" / "report.html", title=more.pop("title", "A title"), **more).read_text()


class Balance(HTMLParser):
    """Fails on a tag that is closed out of turn."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_run_shows_its_facts_its_curves_its_data_and_its_configuration(tmp_path):
    html = report(tmp_path, [make(tmp_path / "run")], summary="All went well.")
    for text in ("A title", "All went well.", "small", "large", "412,800 parameters", "1.72M parameters", "40,000"):
        assert text in html
    charts = ["Validation loss", "Training loss", "Agreement", "Entropy", "Gradient norm", "Learning rate"]
    assert re.findall("<h3>(.*?)</h3>", html) == [*charts, "Throughput", "Padding", "Time of a step"]
    assert "lowest 0.175 at step 40" in html
    assert "1.5 GB" in html
    assert "400 rows read." in html
    assert "&quot;seed&quot;: 42" in html[html.index("<details") :]


def test_the_page_is_balanced_and_self_contained(tmp_path):
    html = report(tmp_path, [make(tmp_path / "a"), make(tmp_path / "b", "plain", distilled=False)])
    balance = Balance()
    balance.feed(html)
    assert balance.open == []
    assert not re.search(r"https?:|//|@import|url\(|<script|<link|<iframe|<img|\bsrc=|\bhref=", html)


def test_every_chart_is_well_formed_and_has_a_text_description(tmp_path):
    html = report(tmp_path, [make(tmp_path / "run", steps=200)])
    charts = [ElementTree.fromstring(found) for found in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]
    assert len(charts) == 9
    assert any("distillation from 4 to 0.0200" in chart.attrib["aria-label"] for chart in charts)


def test_several_runs_are_laid_over_each_other_under_their_names(tmp_path):
    runs = [make(tmp_path / "a", "plain", distilled=False), make(tmp_path / "b", "distilled")]
    html = report(tmp_path, runs, levels=[Level("val/ce", "teacher", 0.05)])
    figure = html[html.index("Validation loss: cross-entropy") :].split("</figure>")[0]
    assert "plain <b>0.175</b>" in figure
    assert "distilled <b>0.175</b>" in figure
    assert "teacher 0.0500" in figure
    assert html.count('class="level"') == 1
    assert "<h3>Training loss: total</h3>" not in html, "sums of different weights are not compared"


def test_a_run_keeps_its_colour_where_another_has_no_such_curve(tmp_path):
    html = report(tmp_path, [make(tmp_path / "a", "plain", distilled=False), make(tmp_path / "b")])
    figure = html[html.index("Validation loss: distillation") :].split("</figure>")[0]
    assert 'class="line s2"' in figure
    assert 'class="line s1"' not in figure


def test_runs_with_the_same_name_are_called_after_their_folders(tmp_path):
    for folder in ("a", "b", "c/a"):
        (tmp_path / folder).mkdir(parents=True)
        make(tmp_path / folder, "night")
    assert [run.name for run in load_runs([tmp_path / "a", tmp_path / "b"])] == ["a", "b"]
    same = [tmp_path / "a", tmp_path / "c/a"]
    assert [run.name for run in load_runs(same)] == [str(folder) for folder in same]
    assert [run.name for run in load_runs([tmp_path / "a"])] == ["night"]


def y_labels(drawn):
    return re.findall(r'text-anchor="end">([^<]*)</text>', drawn)[:-1]  # the last one is that of the steps


@settings(max_examples=50)
@given(low=st.floats(-1e6, 1e6), span=st.floats(1e-4, 1e6))
def test_no_two_ticks_have_the_same_label(low, span):
    labels = y_labels(line_chart("x", [Curve("x", np.array([1.0, 2.0]), np.array([low, low + span]))]))
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_the_axis_of_a_share_stays_between_0_and_100_percent(value):
    drawn = line_chart("x", [Curve("x", np.array([1.0, 2.0]), np.full(2, value))], show=percent)
    assert all(0 <= float(label.rstrip("%")) <= 100 for label in y_labels(drawn))


def test_the_better_value_is_marked_and_the_reference_does_not_compete(tmp_path):
    table = ResultTable(
        ("Plain", "Distilled", "Teacher"),
        (
            ResultRow("Exact match", (0.25, 0.5, 0.9), "higher", percent=True),
            ResultRow("Cross-entropy", (0.75, 0.125, 0.0625), "lower"),
            ResultRow("Agreement", (None, 0.8, None), "higher"),
        ),
        reference="Teacher",
    )
    html = report(tmp_path, [make(tmp_path / "run")], table=table)
    assert re.findall(r'<td class="best">(.*?)</td>', html) == ["50.0%", "0.125"]
    assert re.findall(r'<td class="reference">(.*?)</td>', html) == ["90.0%", "0.0625", "–"]


def test_samples_show_the_question_every_answer_and_the_verdicts(tmp_path):
    sample = Sample("How many?", "#### 4", (Answer("Plain", "#### 5", False), Answer("Distilled", "#### 4", True)))
    html = report(tmp_path, [make(tmp_path / "run")], samples=[sample])
    assert "How many?" in html
    assert re.findall(r'class="verdict (\w+)"', html) == ["wrong", "right"]


def test_text_from_outside_is_never_markup(tmp_path):
    evil = "<script>alert('x')</script>\"&"
    run = make(tmp_path / "a", evil, student=f"models/{evil}x", data=evil, config={evil: evil}, limbeck_version=evil)
    other = make(tmp_path / "b", evil)
    table = ResultTable((evil,), (ResultRow(evil, (1.0,), "lower", note=evil),))
    samples = [Sample(evil, evil, (Answer(evil, evil, True),))]
    for runs in ([run], [run, other]):
        html = report(
            tmp_path, runs, title=evil, summary=evil, table=table, samples=samples, levels=[Level("val/ce", evil, 1.0)]
        )
        assert "<script" not in html
        assert "&lt;script&gt;alert(&#x27;x&#x27;)" in html
        for found in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
            ElementTree.fromstring(found)


def test_keys_and_passwords_stay_out_of_the_page(tmp_path):
    config = {
        "tracker_kwargs": {"api_key": "open-sesame"},
        "system_envs": [{"HF_TOKEN": "open-sesame"}],
        "tokenizer": "ours",
    }
    html = report(tmp_path, [make(tmp_path / "run", config=config)])
    assert "open-sesame" not in html
    assert "ours" in html


def test_the_page_of_a_long_run_stays_small(tmp_path):
    facts = {"exp_name": "long"}
    long = Run("long", facts, {step: row for step, row in enumerate(rows(20_000), 1) if "train/loss" in row})
    assert len(report(tmp_path, [long])) < 250_000


def test_notices_about_the_folder_are_shown(tmp_path):
    run = make(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").open("a").write('{"step"')
    assert "incomplete" not in report(tmp_path, [run])
    assert "incomplete" in report(tmp_path, [load_run(tmp_path / "run")])


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(-1e12, 1e12), min_size=1, max_size=30), log=st.booleans(), zero=st.booleans())
def test_any_finite_curve_is_drawn_inside_its_frame(values, log, zero):
    curve = Curve("x", np.arange(float(len(values))), np.array(values))
    svg = line_chart("Any", [curve], log=log, from_zero=zero)
    for x, y in re.findall(r"([-\d.]+),([-\d.]+)", re.search(r'class="line s1" points="(.*?)"', svg)[1]):
        assert 0 <= float(x) <= 520
        assert 0 <= float(y) <= 230


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1_723_680, "1.72M"),
        (8e9, "8B"),
        (43_100, "43,100"),
        (99.97, "100"),
        (0.1, "0.100"),
        (5e-5, "5.00e-05"),
        (0, "0"),
    ],
)
def test_numbers_are_written_for_people(value, text):
    assert number(value) == text
