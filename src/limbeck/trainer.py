"""A ``transformers.Trainer`` with a teacher.

Arguments, callbacks, logging and ``accelerate`` are those of the Trainer. The student is wrapped together with the loss,
so that data-parallel wrappers see one module whose forward pass ends in the loss. Only the student is saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from limbeck.data import IGNORE, Batch
from limbeck.errors import LimbeckError
from limbeck.models import body, check_head, output_head
from limbeck.objectives import Objective
from limbeck.strategies.base import FrozenModel
from limbeck.teachers import LocalTeacher
from limbeck.train.student import LossSettings, StudentWithLoss, TrainInput

try:
    import accelerate  # noqa: F401  (for a clear error message)
    from transformers import Trainer
except ImportError as error:
    raise LimbeckError("limbeck.DistillTrainer needs accelerate; pip install 'limbeck[trainer]'.") from error


class _Distilled(nn.Module):
    """Student and teacher with the Trainer's calling convention: takes keyword tensors, returns a dict with ``loss``."""

    def __init__(self, student: StudentWithLoss, teacher: LocalTeacher | None) -> None:
        super().__init__()
        self.student = student
        self.config = student.model.config
        # In a tuple, so that it is not a submodule: the frozen teacher must not be trained, saved or moved by the Trainer.
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
        """The loss of a batch.

        Args:
            input_ids: [batch, time], padded on the right.
            labels: [batch, time], not shifted; −100 is ignored.
            num_items_in_batch: number of supervised tokens that the loss is divided by; by default those of this batch.
        """
        shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
        batch = Batch.of(input_ids, shifted, None, input_ids.numel())
        (teacher,) = self._teacher
        signal = None if teacher is None else teacher.compute_signal(batch)
        count = (shifted != IGNORE).sum().clamp_min(1) if num_items_in_batch is None else num_items_in_batch
        return {"loss": self.student(TrainInput(batch, signal, count)).loss}


class DistillTrainer(Trainer):
    """A ``Trainer`` that distils ``teacher`` into ``model``.

    Batches have right-padded ``input_ids`` and ``labels`` [batch, time]; labels are not shifted, and −100 is ignored. The
    loss is divided by the number of supervised tokens of the whole step, over gradient accumulation and processes. Logits
    are not computed, so ``compute_metrics`` does not receive any.

    Args:
        model: the student.
        teacher: a causal language model with the student's tokenizer; None trains with cross-entropy only.
        objective, kd_weight, temperature, teacher_temperature, topk: as in ``Objective.of``.
        temperature_squared: multiply the divergence by the squared temperature.
        parameters: of the divergence, such as alpha, skew or beta.
        args, kwargs: arguments of ``Trainer``.
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
        self._evaluated = (0.0, 0)  # the sum of the losses of an evaluation, and the number of its supervised tokens

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in ``Trainer``, with the loss per supervised token: its mean over batches depends on their size."""
        self._evaluated = (0.0, 0)
        output = super().evaluation_loop(*args, **kwargs)
        sums = self.accelerator.reduce(torch.tensor(self._evaluated, device=self.args.device))
        key = f"{kwargs.get('metric_key_prefix', 'eval')}_loss"
        if key in output.metrics and sums[1] > 0:
            output.metrics[key] = (sums[0] / sums[1]).item()
        return output

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        result = super().prediction_step(model, inputs, *args, **kwargs)
        loss, tokens = self._evaluated
        count = int((inputs["labels"][:, 1:] != IGNORE).sum())
        self._evaluated = (loss + result[0].item() * count, tokens + count)
        return result

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
