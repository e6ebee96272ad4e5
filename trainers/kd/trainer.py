"""KDTrainer: `transformers.Trainer` with a teacher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import Subset
from transformers import TrainingArguments

from peft_dynamic.hosts.repeated import real_rows
from peft_dynamic.rules import taken_from
from peft_dynamic.trainers.kd.config import KDConfig
from peft_dynamic.trainers.kd.distiller import Distiller
from peft_dynamic.trainers.kd.shell import DistillingTrainer, scaled


class KDTrainer(DistillingTrainer):
    """Trains a classifier, an encoder-decoder or a causal model on labels and a teacher.

    Takes what `transformers.Trainer` takes. Fine-tuning, label smoothing and distillation differ in `teacher` alone:

        settings = KDConfig("out", kd_weight=0.5, temperature=2.0, max_steps=1)
        KDTrainer(student, "teacher-dir", settings, train_dataset=labelled_rows).train()

    The loss is the mean over the rows of all processes and parts of a step: sentences of a classifier, labelled tokens
    of other models. A classifier's rows without a label (-100, or no column "labels") have the teacher's term alone.
    `eval_loss` is the loss of the labels, as without a teacher. Logged are also "ce", "kd", "agreement" (how often the
    likeliest class is the teacher's), "accuracy", the schedules' values, "sample_weight", "undecided", "suspected" and
    the names of `features` where they are asked for, and in evaluation the teacher's own "ce" and "accuracy".

    Args:
        model: the student.
        teacher: see `Distiller`.
        args: a `KDConfig`; other training arguments become one; None for its defaults.
        *positional: as of `Trainer` from its third on: data_collator, train_dataset, ...
        peft_config: an adapter's configuration, to put one into the model first.
        teacher_quantization: "nf4" to load a path in 4 bits.
        **kwargs: as of `Trainer`.

    Raises:
        ValueError, TypeError: before any training: a teacher that cannot teach this student, other tokens or classes,
            `compute_loss_func`, `label_smoothing_factor`, ZeRO-3, nn.DataParallel, tensor and context parallelism.
    """

    args: KDConfig
    train_dataset: Any

    def __init__(
        self,
        model: Any,
        teacher: Any = None,
        args: TrainingArguments | None = None,
        *positional: Any,
        peft_config: Any = None,
        teacher_quantization: str | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func: the loss is that of the labels and the teacher; leave it out.")
        if peft_config is not None:
            from peft import PeftModel, get_peft_model

            if isinstance(model, PeftModel):
                raise ValueError("peft_config: the model has an adapter already; leave one of them out.")
            model = get_peft_model(model, peft_config)
        config = KDConfig() if args is None else args if isinstance(args, KDConfig) else taken_from(KDConfig, args)
        super().__init__(model, config, *positional, **kwargs)
        self.distiller = Distiller(self.model, teacher, config, self.processing_class, teacher_quantization)
        self.start()
        self._meta_rows: Any = None
        if self.distiller.meta is not None and self.train_dataset is not None:
            self._set_aside()
        if self.distiller.noise is not None and self.train_dataset is not None:
            self._check_indexed("label_noise")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        training = self.model.training
        if training and self.distiller.meta is not None and self.distiller.meta.direction is None:
            self.distiller.aim(self._batches(self._meta_rows, self._meta_places()), self.progress)
        if training and self.distiller.noise is not None and self.distiller.noise.bound is None:
            places = range(self.args.process_index, len(self.train_dataset), self.args.world_size)
            self.distiller.look(self._batches(self.train_dataset, places))
        found = self.distiller.compute(inputs, self.progress, model, num_items_in_batch, whole=not training)
        if training:
            self.used = self.distiller.values(self.progress)
            self.sums[True].add(self.accelerator, found.sums, found.counts)
            loss = scaled(self, found.loss, num_items_in_batch)
        else:
            self._add_evaluated(inputs, found)
            loss = found.sums["ce"] / max(found.counts["ce"], 1)
        return (loss, found.outputs) if return_outputs else loss

    def _set_aside(self) -> None:
        """Take the rows for `sample_weights` out of the training rows, by the seed."""
        self._check_indexed("sample_weights")
        share, rows = self.args.meta_fraction, self.train_dataset
        count = int(share * len(rows))
        if not 0 < count < len(rows):
            raise ValueError(
                f"meta_fraction={share} of {len(rows)} training rows is {count}: at least one must be set aside, and "
                "one be left. Set another share, or leave sample_weights out."
            )
        drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self._seed)).tolist()
        aside, kept = (sorted(part) for part in (drawn[:count], drawn[count:]))
        self._meta_rows, self.train_dataset = (
            rows.select(part) if hasattr(rows, "select") else Subset(rows, part) for part in (aside, kept)
        )

    def _check_indexed(self, name: str) -> None:
        if not hasattr(self.train_dataset, "__len__") or not hasattr(self.train_dataset, "__getitem__"):
            raise ValueError(
                f"{name}={getattr(self.args, name)!r} chooses among all training rows, and train_dataset has no length "
                f"or no index. Pass one that has, or leave {name} out."
            )

    @property
    def _seed(self) -> int:
        return int(self.args.seed if self.args.data_seed is None else self.args.data_seed)

    def _meta_places(self) -> list[int]:
        """This process's part of the rows set aside that serve this step: as many as it trains on, drawn by its number.

        So the draw is the same however the step is cut into parts, and in a resumed run.
        """
        args, draw = self.args, torch.Generator().manual_seed(self._seed * 1_000_003 + self.state.global_step)
        wanted = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        drawn = torch.randperm(len(self._meta_rows), generator=draw)[:wanted].tolist()
        return drawn[args.process_index :: args.world_size]

    def _batches(self, rows: Any, places: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Batches of some rows, made as Trainer makes those of the training."""
        collate: Any = self.data_collator
        if hasattr(rows, "select"):
            rows = self._remove_unused_columns(rows, "rows by number")
        else:
            collate = self._get_collator_with_removed_columns(collate, "rows by number")
        size = self.args.per_device_train_batch_size
        for start in range(0, len(places), size):
            yield self._prepare_inputs(collate([rows[i] for i in places[start : start + size]]))

    def _add_evaluated(self, inputs: dict[str, Any], found: Any) -> None:
        """Add an evaluated batch; of one that accelerate has filled up, the rows that are there once."""
        first = next(value for value in inputs.values() if isinstance(value, torch.Tensor))
        kept = real_rows(self.accelerator, self.args.per_device_eval_batch_size, first)
        if kept is None:
            self.sums[False].add(self.accelerator, found.sums, found.counts)
            return
        empty = not bool(kept.any())
        part = {name: value if empty or not torch.is_tensor(value) else value[kept] for name, value in inputs.items()}
        again = self.distiller.compute(part, self.progress, whole=True)  # on all: FSDP's weights come from everybody
        sums = {name: value * (not empty) for name, value in again.sums.items()}
        self.sums[False].add(self.accelerator, sums, dict.fromkeys(sums, 0) if empty else again.counts)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Any:
        """Trainer's count of labels; of a classifier the count of rows, as those without a label are trained too."""
        if self.distiller.task != "sequence":
            return super()._get_num_items_in_batch(batch_samples, device)
        rows = [{"labels": torch.zeros(self.distiller.rows_of(batch), dtype=torch.long)} for batch in batch_samples]
        return super()._get_num_items_in_batch(rows, device)
