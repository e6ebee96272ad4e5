"""One loss for every task, teacher and schedule: what the trainers carry and a bare loop calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import mse_loss

from peft_dynamic.functional.distill import IGNORED, divergence, label_loss, manual_logits
from peft_dynamic.functional.schedule import Schedule
from peft_dynamic.hosts.blocks import base_model
from peft_dynamic.hosts.modes import evaluating
from peft_dynamic.hosts.quantization import unpack_bnb_4bit
from peft_dynamic.trainers.kd.checks import check_noise, check_rows, check_student, check_teacher
from peft_dynamic.trainers.kd.config import DistillFields, KDConfig
from peft_dynamic.trainers.kd.features import Features
from peft_dynamic.trainers.kd.noise import LabelNoise
from peft_dynamic.trainers.kd.tasks import task_of
from peft_dynamic.trainers.kd.teachers import (
    CachedTeacher,
    ModelTeacher,
    Teacher,
    find_teacher,
)
from peft_dynamic.trainers.kd.weights import MetaWeights


@dataclass
class Distilled:
    """What a batch loses, in sums over its rows: sentences of a classifier, labelled tokens of other models.

    Attributes:
        loss: () the rows' losses over how many they are, or over `items`; with gradients.
        outputs: what the student's forward gave.
        sums: name -> sum: "ce" the labels' loss, "kd" the divergence, "agreement" rows whose likeliest class is the
            teacher's, "accuracy" and "teacher_accuracy" rows whose likeliest class is the label, "teacher_ce"; with
            weights of single rows "sample_weight", and "undecided", rows that neither their label nor their teacher
            helps, which have the weight 1/2; with `label_noise` "suspected", rows whose label the teacher finds wrong;
            and the names of `features`, without their weights.
        counts: name -> over how many rows that sum goes.
    """

    loss: torch.Tensor
    outputs: Any
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, values: torch.Tensor, count: int) -> None:
        """Note one value per row, of which `count` are not 0 for want of a label."""
        self.sums[name] = values.detach().float().sum()
        self.counts[name] = count


class Distiller:
    """The loss of a student that learns from labels and a teacher.

        distiller = Distiller(student, "teacher-dir", KDConfig(kd_weight=0.5, temperature=2.0))
        loss = distiller(labelled_batch, progress=0.1)  # steps done over all steps
        loss.backward()
        distiller.updated()  # after the optimizer's step

    Each batch is a mapping for the student's forward, with "labels". Works with classifiers of sequences (regression
    too) and of tokens, masked, causal and encoder-decoder language models, of transformers, with any adapter or none.

    Args:
        student: the model.
        teacher: None for the labels alone; "smoothing" for label smoothing; "manual" for TF-reg, which is nearly sure
            of each label; a model; a path or a name of the Hub, of a model or an adapter; a list of these, which teach
            one after the other; "base" for the student without its adapters; "adapter:NAME" for another adapter of the
            same model; "full_rank" for the adapter at its full rank in steps at a lower one; "ema" for the running mean
            of what is trained.
        config: a `KDConfig`, `KDSFTConfig` or `DistillFields`; None for the defaults.
        processing_class: the student's tokenizer, to compare the teacher's with; None to compare their sizes only.
        teacher_quantization: "nf4" to load a path in 4 bits; None for the type that the file has.

    Attributes:
        width: how many tokens student and teacher share, where their vocabularies differ in padding; else None.

    Raises:
        ValueError, TypeError: before any training: what a teacher or a task cannot do, with the way out.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any = None,
        config: DistillFields | None = None,
        processing_class: Any = None,
        teacher_quantization: str | None = None,
    ) -> None:
        self.student = student
        self.config = KDConfig() if config is None else config
        self.processing_class = processing_class
        self.task = task_of(student)
        if teacher_quantization not in (None, "nf4"):
            raise ValueError(f"teacher_quantization={teacher_quantization!r}: must be 'nf4' or None.")
        check_student(self, teacher)
        unpack_bnb_4bit(student)  # it is trained after evaluations
        moving = {name: Schedule.parse(getattr(self.config, name)) for name in _MOVING}
        self._weight, self._temperature, self._scale = (moving[name] for name in _MOVING)
        self.width: int | None = None
        self._checked = False
        settings = self.config
        self.teacher = find_teacher(
            teacher,
            student,
            settings.teacher_switches,
            settings.ema_decay,
            teacher_quantization,
            partial(check_teacher, self),
        )
        idle = self._weight.constant and self._weight.values[0] == 0 and self.config.label_noise is None
        idle = idle and self.config.features is None
        if isinstance(self.teacher, Teacher) and idle:
            raise ValueError(
                "kd_weight=0 with a teacher: it would run and teach nothing. Leave teacher out to train on the labels."
            )
        check_rows(self)
        check_noise(self)
        self.features = self._features()
        self.meta = None if self.config.sample_weights is None else MetaWeights(student)
        self.noise: LabelNoise | None = None
        if self.config.label_noise is not None:
            self.noise = LabelNoise(self.config.label_noise, self.config.noise_rate)

    def __call__(self, batch: Mapping[str, torch.Tensor], progress: float = 0.0) -> torch.Tensor:
        """The loss of a batch, with gradients; `compute` has more."""
        return self.compute(batch, progress).loss

    def updated(self) -> None:
        """To be called after each optimizer step; teacher="ema" and the matrices of `features` need it."""
        for parameter in self.parameters():
            parameter.grad = None  # the trainer empties the student's alone
        if isinstance(self.teacher, Teacher):
            self.teacher.updated()

    def hardest(
        self, batch: Mapping[str, torch.Tensor], of: int, keep: int, progress: float = 0.0
    ) -> dict[str, torch.Tensor]:
        """Of each row's augmentations those at which the student is furthest from the teacher, as Glitter chooses.

        The student is asked in eval mode and without gradients. With a cache as teacher, it alone has a pass.

        Args:
            batch: a classifier's, with the augmentations of each row behind each other.
            of: how many augmentations each row has.
            keep: how many of them stay, in their order.
            progress: as in `compute`.

        Raises:
            ValueError: the student is no classifier of sequences, no model teaches, or the numbers do not fit.

        Source: E. Kamalloo, M. Rezagholizadeh, A. Ghodsi: When Chosen Wisely, More Data Is What You Need, Findings of
        ACL 2022, arXiv 2203.09391.
        """
        rows = len(next(iter(batch.values())))
        if self.task != "sequence" or not isinstance(self.teacher, Teacher):
            raise ValueError("hardest: needs a classifier of sequences and a model as teacher.")
        if not 0 < keep <= of or rows % of:
            raise ValueError(
                f"of={of}, keep={keep}: keep must be from 1 to of, and of must divide the {rows} rows of the batch."
            )
        taught = self._taught(batch, progress)
        if taught is None:
            raise ValueError("hardest: the teacher has nothing to say in this step.")
        with evaluating(self.student):
            far = self._pair(batch, taught, progress)()[1]
        best = far.reshape(-1, of).topk(keep).indices.sort().values
        places = (best + of * torch.arange(len(best), device=best.device)[:, None]).flatten()
        return {name: value[places.to(value.device)] for name, value in batch.items()}

    def parameters(self) -> list[torch.nn.Parameter]:
        """What is trained beside the student: matrices of `features` between states of different widths."""
        return [] if self.features is None else list(self.features.projections.parameters())

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint has to keep beside the student and the optimizer."""
        found = dict(self.teacher.state()) if isinstance(self.teacher, Teacher) else {}
        return found | {f"{_PROJECTION}{i}": p.detach() for i, p in enumerate(self.parameters())}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """What `state` gave.

        Raises:
            ValueError: it is of other matrices or another running mean.
        """
        own = {name: value for name, value in state.items() if name.startswith(_PROJECTION)}
        shapes = {f"{_PROJECTION}{i}": p.shape for i, p in enumerate(self.parameters())}
        if {name: value.shape for name, value in own.items()} != shapes:
            raise ValueError("features: the checkpoint's matrices between the layers are of other layers or widths.")
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(own[f"{_PROJECTION}{i}"])
        if isinstance(self.teacher, Teacher):
            self.teacher.load_state({name: value for name, value in state.items() if name not in own})

    def begun(self) -> None:
        """Before the first part of an optimizer step: the rows set aside are asked anew."""
        if self.meta is not None:
            self.meta.direction = None

    def aim(self, batches: Iterable[Mapping[str, torch.Tensor]], progress: float = 0.0) -> None:
        """Of sample_weights="meta": take the gradient of rows that are set aside. To be called before each step.

        Args:
            batches: of these rows, with "labels"; of all processes together.
            progress: as in `compute`.
        """
        assert self.meta is not None
        self.meta.aim(self._pair(batch, self._taught(batch, progress), progress) for batch in batches)

    def look(self, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """Of `label_noise`: ask the teacher about all training rows. To be called before the first step.

        Args:
            batches: of all training rows, with "labels"; of all processes together.
        """
        assert self.noise is not None
        losses = []
        for batch in batches:
            taught, labels = self._taught(batch, 0.0), self._labels(batch)
            assert taught is not None
            losses.append(label_loss(taught, labels.to(taught.device))[labels.to(taught.device) != IGNORED])
        self.noise.look(losses)

    def values(self, progress: float) -> dict[str, float]:
        """The weight, temperature and scale at a progress; no weight where each row has its own."""
        found = (self._weight(progress), self._temperature(progress), self._scale(progress))
        values = dict(zip(_MOVING, found, strict=True)) if self.taught else {}
        if self.meta is not None:
            del values["kd_weight"]
        return values

    @property
    def taught(self) -> bool:
        """Whether there is a divergence to weigh: a teacher, or the formula of TF-reg."""
        return self.teacher is not None and self.teacher != "smoothing"

    def compute(
        self,
        batch: Mapping[str, torch.Tensor],
        progress: float = 0.0,
        model: Any = None,
        items: torch.Tensor | int | None = None,
        whole: bool = False,
    ) -> Distilled:
        """The loss and what it is made of.

        Args:
            batch: for the student's forward, with "labels".
            progress: steps done over all steps, 0 to 1.
            model: what is called, such as DDP's wrapper of the student; None for the student.
            items: by how many rows the sum is divided; None for those of the batch.
            whole: ask the teacher also where the weight is 0, to report on it.
        """
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        labels = self._labels(batch)
        self._check_loss(batch)
        weight: float | torch.Tensor = self._weight(progress)
        taught: torch.Tensor | None = None
        watched = None if whole else self.features
        more: dict[str, Any] = {"output_hidden_states": True} if watched is not None and watched.states else {}
        theirs: Any = None
        if watched is not None:
            assert isinstance(self.teacher, Teacher)
            with watched.watching(self.teacher.at(progress), 1) as noted:
                said = self.teacher.outputs(self._with_decoder(inputs, labels), progress, **more)
            if said is not None:
                taught, theirs = said.logits, (said.get("hidden_states"), noted)
        elif weight > 0 or whole or self.noise is not None:  # first: see teachers.py
            taught = self._taught(batch, progress)
        if self.meta is not None and not whole:  # before the student's pass too, as it moves the weights
            known = torch.ones_like(labels) if self.regression else labels != IGNORED
            weight = torch.where(known.reshape(-1).bool(), self.meta.shares(self._pair(batch, taught, progress)), 1.0)
        called = self.student if model is None else model
        if theirs is None:
            outputs = called(**self._with_decoder(inputs, labels))
            return self._losses(batch, outputs, taught, weight, progress, items, whole)
        assert watched is not None
        with watched.watching(self.student, 0) as seen:
            outputs = called(**self._with_decoder(inputs, labels), **more)
        result = self._losses(batch, outputs, taught, weight, progress, items, whole)
        self._add_features(result, (outputs.get("hidden_states"), seen), theirs, batch, items)
        return result

    def _losses(
        self,
        batch: Mapping[str, torch.Tensor],
        outputs: Any,
        taught: torch.Tensor | None,
        weight: float | torch.Tensor,
        progress: float,
        items: torch.Tensor | int | None,
        whole: bool,
    ) -> Distilled:
        """What the logits lose."""
        labels, temperature, scale = self._labels(batch), self._temperature(progress), self._scale(progress)
        rows, targets = self._rows(outputs.logits, labels)
        target_rows = None if taught is None else self._rows(taught, labels)[0].to(rows.device)
        if self.regression:
            return self._regression(rows, targets, target_rows, weight, scale, outputs, items)
        used, suspected, known = targets, None, targets != IGNORED
        if self.noise is not None and not whole:
            assert target_rows is not None
            used, suspected = self.noise.cleaned(targets, target_rows)
        ce = label_loss(rows, used)
        result = Distilled(ce.sum(), outputs)
        if suspected is not None:
            result.add("suspected", suspected, int(known.sum()))
        self._add_weights(result, weight)
        result.add("ce", ce.detach(), int((used != IGNORED).sum()))
        result.add("accuracy", rows.argmax(1) == targets, int(known.sum()))
        each = ce
        if self.teacher == "smoothing":
            each = label_loss(rows, targets, self.config.smoothing)
        elif self.teacher == "manual":
            target_rows = manual_logits(targets, rows.shape[1], self.config.smoothing)
        if target_rows is not None:
            width = min(rows.shape[1], target_rows.shape[1], self.width or rows.shape[1])
            both = rows[:, :width], target_rows[:, :width]
            kd = divergence(*both, self.config.divergence, temperature, scale, self.config.margin)
            each = _mixed(ce, kd, weight)
            result.add("kd", kd.detach(), len(rows))
            result.add("agreement", both[0].argmax(1) == both[1].argmax(1), len(rows))
            if self.teacher != "manual":
                result.add("teacher_ce", label_loss(target_rows, targets), int(known.sum()))
                result.add("teacher_accuracy", target_rows.argmax(1) == targets, int(known.sum()))
        result.loss = _over(each.sum(), len(rows), items)
        return result

    @property
    def regression(self) -> bool:
        """Whether the student gives one number per row, and the labels are numbers."""
        config = base_model(self.student).config
        kind = getattr(config, "problem_type", None)
        return self.task == "sequence" and (kind == "regression" or (kind is None and config.num_labels == 1))

    def rows_of(self, batch: Mapping[str, torch.Tensor]) -> int:
        """How many rows of a batch count: sentences of a classifier, also those without a label; or labelled tokens."""
        labels = self._labels(batch)
        if self.task == "sequence":
            return len(labels)
        return int((labels[:, 1:] if self.task == "causal" else labels).ne(IGNORED).sum())

    def _regression(
        self,
        rows: torch.Tensor,
        targets: torch.Tensor,
        taught: torch.Tensor | None,
        weight: float | torch.Tensor,
        scale: float,
        outputs: Any,
        items: torch.Tensor | int | None,
    ) -> Distilled:
        values, wanted = rows.float(), targets.float().reshape(rows.shape)  # never (B, 1) against (B,)
        ce = each = mse_loss(values, wanted, reduction="none").mean(1)
        result = Distilled(ce, outputs)
        self._add_weights(result, weight)
        result.add("ce", ce.detach(), len(rows))
        if taught is not None:
            kd = mse_loss(values, taught.float().reshape(rows.shape) * scale, reduction="none").mean(1)
            each = _mixed(ce, kd, weight)
            result.add("kd", kd.detach(), len(rows))
            result.add(
                "teacher_ce", mse_loss(taught.float().reshape(rows.shape), wanted, reduction="none").mean(1), len(rows)
            )
        result.loss = _over(each.sum(), len(rows), items)
        return result

    def _add_features(
        self, result: Distilled, own: Any, theirs: Any, batch: Mapping[str, torch.Tensor], items: Any
    ) -> None:
        """Add the further terms. Each labelled token of a row counts for it, as in the labels' loss."""
        assert self.features is not None
        mask = batch.get("attention_mask")
        mask = torch.ones_like(batch["input_ids"]) if mask is None else mask
        labels = self._labels(batch)
        counts = torch.ones(len(labels)) if self.task == "sequence" else labels.ne(IGNORED).sum(1)
        if self.task == "causal":
            counts = labels[:, 1:].ne(IGNORED).sum(1)
        total = int(counts.sum())
        for name, each in self.features.losses(own, theirs, mask.bool()).items():
            weighed = each * counts.to(each)
            result.loss = result.loss + self.features.weights[name] * _over(weighed.sum(), total, items)
            result.add(name, weighed, total)

    def _taught(self, batch: Mapping[str, torch.Tensor], progress: float) -> torch.Tensor | None:
        """What a teacher that is a model says of a batch."""
        if not isinstance(self.teacher, Teacher):
            return None
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return self.teacher.logits(self._with_decoder(inputs, self._labels(batch)), progress)

    def _pair(
        self, batch: Mapping[str, torch.Tensor], taught: torch.Tensor | None, progress: float
    ) -> Callable[[], torch.Tensor]:
        """What computes (2, N) losses of a classifier's rows: the labels' and the teacher's."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        labels, scale = self._labels(batch), self._scale(progress)
        assert taught is not None

        def losses() -> torch.Tensor:
            rows, targets = self._rows(self.student(**inputs).logits, labels)
            wanted = taught.to(rows.device)
            if self.regression:
                pair = targets.reshape(rows.shape).to(rows), wanted.reshape(rows.shape).to(rows) * scale
                return torch.stack([(rows - each).square().mean(1) for each in pair])
            kd = divergence(
                rows, wanted, self.config.divergence, self._temperature(progress), scale, self.config.margin
            )
            return torch.stack([label_loss(rows, targets), kd])

        return losses

    def _add_weights(self, result: Distilled, weight: float | torch.Tensor) -> None:
        if isinstance(weight, torch.Tensor):
            result.add("sample_weight", weight, len(weight))
            result.add("undecided", weight == 0.5, len(weight))

    def _labels(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        labels = batch.get("labels")
        if labels is not None:
            return labels
        first = next(iter(batch.values()))
        if self.task != "sequence" or self.regression or not isinstance(self.teacher, Teacher):
            raise ValueError("the batch has no labels. Only a classifier of sequences with a teacher learns without.")
        return torch.full((len(first),), IGNORED, device=first.device)

    def _with_decoder(self, inputs: dict[str, Any], labels: torch.Tensor) -> dict[str, Any]:
        """The inputs with those of an encoder-decoder's decoder, which its forward makes of labels."""
        if self.task != "seq2seq" or "decoder_input_ids" in inputs or "decoder_inputs_embeds" in inputs:
            return inputs
        made = base_model(self.student).prepare_decoder_input_ids_from_labels(labels=labels)
        return {**inputs, "decoder_input_ids": made}

    def _rows(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, K) logits and (N,) labels of what counts."""
        if self.task == "sequence":
            if logits.dim() != 2 or (labels.shape != logits.shape[:1] and not self.regression):
                raise ValueError(
                    f"labels {tuple(labels.shape)} and logits {tuple(logits.shape)}: one label per row is needed."
                )
            return logits, labels
        if self.task == "causal":
            logits, labels = logits[:, :-1], labels[:, 1:]
        if logits.shape[:2] != labels.shape:
            raise ValueError(f"labels {tuple(labels.shape)} and logits {tuple(logits.shape)}: the lengths differ.")
        keep = labels.to(logits.device) != IGNORED
        return logits[keep], labels.to(logits.device)[keep]

    def _check_loss(self, batch: Mapping[str, torch.Tensor]) -> None:
        """Once: compare the labels' loss with the student's own, so that no model is trained on another one's loss.

        Raises:
            ValueError: they differ.
        """
        if self._checked:
            return
        labels = batch.get("labels")
        fit = labels is not None and self.rows_of(batch) > 0
        if labels is not None and self.task == "sequence" and not self.regression:
            fit = fit and not bool((labels == IGNORED).any())
        self._checked = _everywhere(fit, next(self.student.parameters()).device)
        if not self._checked or labels is None:
            return
        with evaluating(self.student):
            outputs = self.student(**batch)
            rows, targets = self._rows(outputs.logits, labels)
            own = (rows.float() - targets.float().reshape(rows.shape)).square() if self.regression else None
            ours = label_loss(rows, targets).mean() if own is None else own.mean()
        theirs = outputs.loss.mean()
        if not torch.isclose(ours.to(theirs), theirs, rtol=1e-2, atol=1e-3, equal_nan=True):
            raise ValueError(
                f"{type(base_model(self.student)).__name__} gives the loss {float(theirs):.6g} for the first batch, "
                f"and the cross entropy of its logits is {float(ours):.6g}: it trains with another loss, against which "
                "a teacher's cannot be weighed. Use a Distiller's parts (peft_dynamic.functional.distill) in a loop of "
                "your own."
            )

    def _features(self) -> Features | None:
        """The further terms, or an error where there are no two models whose layers can be seen."""
        config, teacher = self.config, self.teacher
        if config.features is None:
            return None
        assert isinstance(config.features, dict)
        if self.task == "seq2seq":
            raise ValueError("features compare layers of one stack, and an encoder-decoder has two. Leave them out.")
        several = isinstance(teacher, ModelTeacher) and len(teacher.teachers) > 1
        if not isinstance(teacher, Teacher) or isinstance(teacher, CachedTeacher) or several:
            kind = "a list" if several else "a cache" if isinstance(teacher, CachedTeacher) else repr(teacher)
            raise ValueError(
                f"features={config.features!r} compare the layers of two models, and teacher is {kind}, which has none "
                "to see. Pass a model, a path or a teacher inside the student, or leave features out."
            )
        causal = self.task == "causal"
        model = teacher.at(0.0)
        return Features(self.student, model, config.features, config.layer_map, config.relation_heads, causal)


_PROJECTION = "projection."
_MOVING = ("kd_weight", "temperature", "teacher_scale")


def _mixed(ce: torch.Tensor, kd: torch.Tensor, weight: float | torch.Tensor) -> torch.Tensor:
    if isinstance(weight, float | int) and weight in (0, 1):
        return kd if weight else ce
    return (1 - weight) * ce + weight * kd


def _everywhere(holds: bool, device: torch.device) -> bool:
    """Whether it holds in all processes: what follows is a forward pass, in which FSDP wants everybody."""
    if not (dist.is_available() and dist.is_initialized()):
        return holds
    flag = torch.tensor(int(holds), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag)


def _over(total: torch.Tensor, rows: int, items: torch.Tensor | int | None) -> torch.Tensor:
    count = torch.as_tensor(rows if items is None else items, device=total.device)
    return total / count.clamp(min=1)
