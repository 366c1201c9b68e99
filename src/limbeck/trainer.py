"""A ``transformers.Trainer`` whose loss is distillation, for those who live there.

Everything else (arguments, callbacks, logging, ``accelerate``) is the Trainer's own. The student is wrapped together
with the loss, so that data-parallel wrappers see one module whose forward ends in the loss; what is saved is the
student alone.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from limbeck.data import IGNORE, Batch
from limbeck.errors import LimbeckError
from limbeck.models import body, check_head, output_head
from limbeck.objectives import Objective
from limbeck.strategies.base import FrozenModel
from limbeck.teachers import LocalTeacher
from limbeck.train.student import LossSettings, StudentWithLoss, TrainInput

try:
    import accelerate  # noqa: F401  (the Trainer says the same far less clearly)
    from transformers import Trainer
except ImportError as error:
    raise LimbeckError("limbeck.DistillTrainer needs accelerate; pip install 'limbeck[trainer]'.") from error


class _Distilled(nn.Module):
    """Student and teacher behind the Trainer's calling convention: keyword tensors in, a dict with ``loss`` out."""

    def __init__(self, student: StudentWithLoss, teacher: LocalTeacher | None) -> None:
        super().__init__()
        self.student = student
        self.config = student.model.config
        # In a tuple, so not a submodule: a frozen teacher is neither trained, nor saved, nor moved twice.
        self._teacher = (teacher,)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # the Trainer reads attributes of a Hugging Face model
            student: Any = super().__getattr__("student")
            return getattr(student.model, name)

    def forward(
        self, input_ids: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None, **ignored: Any
    ) -> dict[str, Tensor]:
        """The loss over ``num_items_in_batch`` supervised tokens (default: this batch's own)."""
        shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
        batch = Batch.of(input_ids, shifted, None, input_ids.numel())
        (teacher,) = self._teacher
        signal = None if teacher is None else teacher.compute_signal(batch)
        count = (shifted != IGNORE).sum().clamp_min(1) if num_items_in_batch is None else num_items_in_batch
        return {"loss": self.student(TrainInput(batch, signal, count)).loss}


class DistillTrainer(Trainer):
    """``Trainer(model=student, …)`` with a teacher.

    teacher: a causal language model with the student's tokenizer, or None for cross-entropy alone. objective,
    kd_weight, temperature, teacher_temperature, temperature_squared, topk and ``parameters`` (alpha, skew, beta of the
    divergence) are those of ``Objective.of``. Batches hold ``input_ids`` and unshifted ``labels`` (−100 where nothing
    is learned), right-padded. The loss is divided once by the supervised tokens of the whole step, over accumulation
    and processes, as the Trainer counts them. Logits are never formed, so ``compute_metrics`` sees none.
    """

    def __init__(
        self,
        model: Any,
        teacher: Any | None,
        *args: Any,
        objective: str = "forward_kl",
        kd_weight: float = 0.5,
        temperature: float = 1.0,
        teacher_temperature: float | None = None,
        temperature_squared: bool = False,
        topk: int = 0,
        parameters: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        check_head(model, "the student")
        vocab = output_head(model).weight.shape[0]
        local = None
        if teacher is not None:
            check_head(teacher, "the teacher")
            head = output_head(teacher.requires_grad_(False))
            vocab = min(vocab, head.weight.shape[0])
            local = LocalTeacher(FrozenModel(body(teacher), head, teacher.num_parameters()))
        goal = Objective.of(
            objective,
            kd_weight=kd_weight if teacher is not None else 0.0,
            temperature=temperature,
            teacher_temperature=teacher_temperature,
            squared=temperature_squared,
            topk=topk,
            parameters=parameters,
        )
        super().__init__(_Distilled(StudentWithLoss(model, LossSettings(goal, vocab)), local), *args, **kwargs)
        if teacher is not None:
            teacher.to(self.args.device)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, self._student if model is None else model)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = output_dir or self.args.output_dir
        self._student.save_pretrained(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    @property
    def _student(self) -> Any:
        return self.accelerator.unwrap_model(self.model).student.model
