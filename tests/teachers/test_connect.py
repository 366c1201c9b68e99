"""What a plug-in teacher must be, and what a run with a teacher without a model needs."""

import json
import re
from pathlib import Path

import pytest
import torch
from runs import metrics

from limbeck import DistillPipeline, LimbeckError, distill
from limbeck.objectives import Logits
from limbeck.registry import NEEDS_NO_MODEL, TEACHERS
from limbeck.teachers import Signal, TeacherInfo

DOCS = Path(__file__).parents[2] / "docs"


def snippet(page: str, word: str) -> str:
    """The Python block of a page that contains ``word``."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.S)
    (found,) = [block for block in blocks if word in block]
    return found


def columns(count):
    """Logits of 0 for the supervised positions."""
    return lambda batch: Signal(None, None, payload=Logits(torch.zeros(len(batch.supervised), count)))


class Uniform:
    """Every token is as likely as any other."""

    info = TeacherInfo(vocab_size=2**31, num_parameters=0)

    def request(self, batch, spec):
        return columns(spec.vocab_size)

    def metrics(self):
        return {}

    def offload(self):
        pass

    reload = offload


@pytest.fixture
def run(configure):
    """Train with an object as the teacher and without a teacher's model."""

    def run(teacher, **changes):
        TEACHERS.register("mine", NEEDS_NO_MODEL)(lambda context: teacher)
        without = {"teacher_pretrain": None, "teacher.source": "mine", "max_steps": 2}
        return DistillPipeline(configure(**without, **changes)).run()

    return run


def test_the_teacher_of_the_page_needs_no_model_and_teaches_the_labels(configure, tmp_path):
    plugin = tmp_path / "label_smoothing.py"
    plugin.write_text(snippet("architecture.md", "LabelSmoothing"))
    config = configure(
        plugins=[str(plugin)],
        distill_loss_weight=1.0,
        **{"teacher_pretrain": None, "teacher.source": "label_smoothing"},
    )
    DistillPipeline(config).run()
    for key in ("val/kd", "val/ce"):
        losses = metrics(tmp_path / "out", key)
        assert losses[-1] < losses[0], key
    assert json.loads((tmp_path / "out" / "run.json").read_text())["teacher"] == "label_smoothing"


def test_the_channel_of_the_page_is_the_one_that_is_tested():
    registration = snippet("cluster.md", "HttpChannel").partition("@")[2]
    assert registration in Path(__file__).with_name("http_teacher.py").read_text()


def test_a_missing_argument_of_a_teacher_source_is_one_sentence(configure):
    plugin = Path(__file__).with_name("http_teacher.py")
    config = configure(plugins=[str(plugin)], **{"teacher.source": "http"})
    with pytest.raises(LimbeckError, match=r"needs teacher\.source_kwargs\.url; set it"):
        DistillPipeline(config).run()


def test_a_teacher_without_a_method_is_refused_before_training(run):
    class Silent:
        info, request, offload, reload = Uniform.info, Uniform.request, Uniform.offload, Uniform.reload

    sentence = "the teacher of teacher.source = mine lacks metrics; define it in the class Silent."
    with pytest.raises(LimbeckError, match=re.escape(sentence)):
        run(Silent())


@pytest.mark.parametrize(
    ("returned", "given"),
    [
        (lambda batch: torch.zeros(2, 3), "a function that returns a Tensor"),
        (lambda batch: None, "a function that returns a NoneType"),
        (Signal(None, None), "Signal"),
    ],
)
@pytest.mark.parametrize("weight", [0.5, 0.0], ids=["training", "validation"])
def test_a_teacher_that_sends_no_signal_is_an_error(run, returned, given, weight):
    teacher = Uniform()
    teacher.request = lambda batch, spec: returned
    with pytest.raises(LimbeckError, match=f"the teacher's method request returned {given}; return a function"):
        run(teacher, distill_loss_weight=weight)


def test_logits_for_a_part_of_the_vocabulary_name_what_to_change(run):
    teacher = Uniform()
    teacher.request = lambda batch, spec: columns(100)
    with pytest.raises(LimbeckError, match=r"only 100 columns, .* 299 tokens; .* vocab_size of TeacherInfo"):
        run(teacher)


def test_a_model_is_needed_unless_the_teacher_source_needs_none(configure):
    TEACHERS.register("model_needed")(lambda context: Uniform())
    with pytest.raises(LimbeckError, match="teacher_pretrain is not set, but distill_loss_weight"):
        configure(**{"teacher_pretrain": None, "teacher.source": "model_needed"})


def test_distill_takes_a_teacher_without_a_model(assets, tmp_path):
    TEACHERS.register("mine", NEEDS_NO_MODEL)(lambda context: Uniform())
    changes = {"max_steps": 1, "sequence_length": 64, "track_with": "none", "output_dir": str(tmp_path / "out")}
    distill(assets / "student", None, assets / "rows.jsonl", **changes, **{"teacher.source": "mine"})
    assert metrics(tmp_path / "out", "train/train_distill_loss")[0] > 0
