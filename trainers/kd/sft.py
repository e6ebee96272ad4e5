"""KDSFTTrainer: TRL's SFTTrainer with a teacher, without anybody's logits in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainingArguments

from peft_dynamic._extras import how_to_install
from peft_dynamic.functional.exit_loss import IGNORED, exit_losses
from peft_dynamic.functional.kd_loss import Distillation, States
from peft_dynamic.rules import taken_from
from peft_dynamic.trainers.kd.config import DistillFields
from peft_dynamic.trainers.kd.distiller import Distiller
from peft_dynamic.trainers.kd.shell import DistillingTrainer
from peft_dynamic.trainers.kd.teachers import Teacher
from peft_dynamic.trainers.soft.base import StatesTrainer

try:
    from trl import SFTConfig
except ImportError as error:
    raise ImportError(f"KDSFTTrainer needs TRL. {how_to_install('trl', 'trl>=1.16', 'datasets')}") from error


@dataclass
class KDSFTConfig(DistillFields, SFTConfig):
    """`SFTConfig` with the settings of a distillation; see `DistillFields` for them.

    Raises:
        ValueError, TypeError: as those, for `loss_type="dft"`, which weighs the labels in a way of its own, and for
            `sample_weights`, `label_noise` and `features`, which KDTrainer has.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_distillation()
        if self.loss_type == "dft":
            raise ValueError("loss_type='dft': a teacher is weighed against the labels' likelihood; use 'nll'.")
        if self.features is not None:
            raise ValueError(
                f"features={self.features!r}: KDSFTTrainer sees the last states alone. Leave them out, or use "
                "KDTrainer, which trains causal models too."
            )
        for name, does in (("sample_weights", "weighs"), ("label_noise", "judges the labels of")):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} {does} a classifier's rows. Leave it out, or use KDTrainer with a "
                    "classifier."
                )


class KDSFTTrainer(DistillingTrainer, StatesTrainer):
    """Fine-tunes a causal language model on text or chats, and on a teacher's distribution of each labelled token.

    Takes what `trl.SFTTrainer` takes: text, chat, prompt and completion, packing, padding-free batches, assistant-only
    loss, any PEFT adapter but prompts, quantised base models.

        settings = KDSFTConfig("out", kd_weight=0.5, max_steps=1, bf16=torch.cuda.is_available())
        KDSFTTrainer("small-model", "big-model", settings, train_dataset=texts).train()

    The states of student and teacher go through their heads in chunks, so that neither's logits are held; see
    `peft_dynamic.functional.kd_loss`. `eval_loss` is the labels' loss. Logged are "ce", "kd", "agreement", the
    schedules' values, and `SFTTrainer`'s `mean_token_accuracy` and `num_tokens`, but not `entropy`.

    Args:
        model: the student, or its path.
        teacher: see `Distiller`. A teacher's vocabulary may differ from the student's in padding only.
        args: a `KDSFTConfig`; other training arguments become one; None for its defaults.
        *positional: as of `SFTTrainer` from its third on.
        teacher_quantization: "nf4" to load a path in 4 bits.
        **kwargs: as of `SFTTrainer`.

    Raises:
        ValueError, TypeError: before any training, as `KDTrainer` and `SoFTTrainer`.
    """

    args: KDSFTConfig
    least_layers = 1
    _tag_names = ["trl", "kd"]  # noqa: RUF012  # TRL's
    _name = "KD"
    _paper = {  # noqa: RUF012  # TRL's
        "title": "Distilling the Knowledge in a Neural Network",
        "id": "1503.02531",
    }

    def __init__(
        self,
        model: Any,
        teacher: Any = None,
        args: TrainingArguments | None = None,
        *positional: Any,
        teacher_quantization: str | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func: the loss is that of the labels and the teacher; leave it out.")
        if args is None:
            name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
            args = KDSFTConfig(f"{name.rstrip('/').split('/')[-1]}-KD")
        config = args if isinstance(args, KDSFTConfig) else taken_from(KDSFTConfig, args)
        super().__init__(model, config, *positional, **kwargs)
        self.begin()
        self.distiller = Distiller(self.model, teacher, config, self.processing_class, teacher_quantization)
        self.start()

    def exits_of(self, mode: str) -> tuple[list[int], list[float]]:
        return [self.decoder.depth], [1.0]

    def distillation(self, mode: str, inputs: dict[str, Any]) -> Distillation | None:
        """What the teacher says of this batch. In evaluation its weight is 0, so that the loss is the labels'."""
        progress, teacher = self.progress, self.distiller.teacher
        values = self.distiller.values(progress)
        if mode == "train":
            self.used = values
        if teacher is None:
            return None
        weight = values.get("kd_weight", 0.0)
        found: Any = teacher
        if isinstance(teacher, Teacher):
            keep = inputs["labels"][:, 1:] != IGNORED
            passed = {name: value for name, value in inputs.items() if name != "labels"}
            found = teacher.states(passed, keep, progress) if weight > 0 or mode == "eval" else None
        elif mode == "eval":
            found = None
        if found is None:
            return None
        if mode == "eval" and isinstance(found, States):
            self._add_teachers_loss(found, inputs["labels"][:, 1:])
        return Distillation(
            found,
            weight if mode == "train" else 0.0,
            values.get("temperature", 1.0),
            values.get("teacher_scale", 1.0),
            self.args.divergence,
            self.args.margin,
            self.args.smoothing,
        )

    def _add_teachers_loss(self, taught: States, labels: torch.Tensor) -> None:
        weight, bias, scale, softcap = taught.head
        targets = labels[labels != IGNORED].to(weight.device)
        nll = exit_losses(taught.states[None], targets, weight, bias, None, scale, softcap).nll
        total, tokens = self.accelerator.gather(torch.stack([nll[0], nll.new_tensor(len(targets))])[None]).sum(0)
        self._add("eval", "teacher_ce", total.item(), tokens.item())

    def _record_losses(
        self, mode: str, exits: list[int], nll: list[float], more: list[list[float]], tokens: float
    ) -> None:
        self._add(mode, "ce", nll[0], tokens)
        if self.distiller.taught:
            for name, values in zip(("kd", "agreement"), more, strict=False):
                self._add(mode, name, values[0], tokens)
