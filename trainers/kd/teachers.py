"""Who teaches: models, the student's own weights under another switch, or nobody but a formula.

A teacher is asked for logits in eval mode and without gradients. One that shares the student's weights puts the modes,
the active adapter, what is trained and the rank back, also after an error; it is asked before the student's own forward
pass, so that no weight that a backward pass needs is exchanged between the two.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from peft_dynamic.functional.kd_loss import States, TopK
from peft_dynamic.hosts.blocks import base_model
from peft_dynamic.hosts.deepspeed import is_parted
from peft_dynamic.hosts.modes import evaluating
from peft_dynamic.hosts.switch import depends_on_trained, switched
from peft_dynamic.trainers.kd.cache import Cache, keyed_rows
from peft_dynamic.trainers.kd.load import load_teacher
from peft_dynamic.trainers.kd.states import Decoder, decoder_states, found_decoder

FORMULAS = ("smoothing", "manual")
INSIDE = ("base", "full_rank", "ema")
KINDS = (
    "None, 'smoothing', 'manual', a model, a path or a name of the Hub, a list of them, 'cache:FOLDER', 'base', "
    "'adapter:NAME', 'full_rank' or 'ema'"
)


class Teacher:
    """What the distiller asks."""

    def logits(self, inputs: Mapping[str, torch.Tensor], progress: float) -> torch.Tensor | None:
        """The logits of a batch without labels, (B, ..., K); None where this step has no teacher.

        Args:
            inputs: what the student gets.
            progress: steps done over all steps.
        """
        found = self.outputs(inputs, progress)
        return None if found is None else found.logits

    def outputs(self, inputs: Mapping[str, torch.Tensor], progress: float, **more: Any) -> Any:
        """What its forward gives; None where this step has no teacher.

        Args:
            inputs: what the student gets.
            progress: steps done over all steps.
            **more: further arguments of the forward.
        """
        raise NotImplementedError

    def at(self, progress: float) -> Any:
        """The model that teaches at this progress."""
        raise NotImplementedError

    def states(self, inputs: Mapping[str, torch.Tensor], keep: torch.Tensor, progress: float) -> States | TopK | None:
        """Of a causal model what `kd_losses` takes, at the positions of `keep`; None where this step has no teacher.

        Args:
            inputs: what the student gets.
            keep: (B, T - 1) bool, the positions whose next token has a label.
            progress: steps done over all steps.
        """
        raise NotImplementedError

    def updated(self) -> None:
        """The optimizer has stepped."""

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint has to keep of it."""
        return {}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """What `state` gave."""


class ModelTeacher(Teacher):
    """One or several models; of those that are paths, one is in memory at a time.

    Args:
        teachers: models, or paths.
        switches: the progresses at which the next one takes over, one less than there are teachers.
        student: is asked for its classes and its place.
        quantization: as in `load_teacher`.
        check: called with each model before it teaches, to refuse it.
    """

    def __init__(
        self, teachers: Sequence[Any], switches: Sequence[float], student: nn.Module, quantization: Any, check: Any
    ) -> None:
        self.teachers, self.switches = list(teachers), list(switches)
        self.student, self.quantization, self.check = student, quantization, check
        self.place: int | None = None
        self.model: Any = None
        self._decoder: Decoder | None = None
        for each in teachers:
            if isinstance(each, nn.Module):
                check(each, None)
        self.at(0.0)  # a path that cannot be read is told of before the training

    def at(self, progress: float) -> Any:
        place = sum(progress >= switch for switch in self.switches)
        if place != self.place:
            self.model = None  # before the next one is there: only one has to fit
            found = self.teachers[place]
            if not isinstance(found, nn.Module):
                found, tokenizer = load_teacher(found, self.student, self.quantization)
                self.check(found, tokenizer)
            self.model, self.place = found.requires_grad_(False).eval(), place
        return self.model

    def _here(self, progress: float) -> Any:
        model = self.at(progress)
        device = next(self.student.parameters()).device
        if next(model.parameters()).device != device and not getattr(model, "is_quantized", False):
            model.to(device)
        return model

    def outputs(self, inputs: Mapping[str, torch.Tensor], progress: float, **more: Any) -> Any:
        model = self._here(progress)
        known = inspect.signature(base_model(model).forward).parameters
        with evaluating(model):  # whoever shares the module has put it into its training mode
            return model(**{name: value for name, value in inputs.items() if name in known}, **more)

    def states(self, inputs: Mapping[str, torch.Tensor], keep: torch.Tensor, progress: float) -> States | TopK | None:
        model = self._here(progress)
        if self._decoder is None or self._decoder.model is not base_model(model):
            self._decoder = found_decoder(model)
        with evaluating(model):
            return decoder_states(self._decoder, inputs, keep)


class CachedTeacher(Teacher):
    """What `cache_teacher` has written: no model is in memory, of a causal one its head alone.

    Args:
        folder: the cache.
        check: called with the cache before it teaches.
    """

    def __init__(self, folder: str, check: Any) -> None:
        self.cache = Cache(folder)
        check(self.cache, None)

    def logits(self, inputs: Mapping[str, torch.Tensor], progress: float) -> torch.Tensor | None:
        found = [self.cache.read(key) for key, _ in keyed_rows(inputs, None)]
        return torch.cat([part["values"] for part in found]).to(inputs["input_ids"].device)

    def states(self, inputs: Mapping[str, torch.Tensor], keep: torch.Tensor, progress: float) -> States | TopK | None:
        return self.cache.taught([key for key, count in keyed_rows(inputs, keep) if count], inputs["input_ids"].device)


class OwnTeacher(Teacher):
    """The student itself, under another switch: adapters off, another adapter, or the full rank.

    Args:
        student: the model without wrappers of the trainer's.
        adapter: the adapter that teaches; None for none.
    """

    def __init__(self, student: Any, adapter: str | None = None) -> None:
        self.student, self.adapter = student, adapter
        self._decoder: Decoder | None = None

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Inside the block the student is its teacher."""
        with switched(self.student, self.adapter):
            yield

    def at(self, progress: float) -> Any:
        return self.student

    def outputs(self, inputs: Mapping[str, torch.Tensor], progress: float, **more: Any) -> Any:
        with evaluating(self.student), self.inside():
            return self.student(**inputs, **more)

    def states(self, inputs: Mapping[str, torch.Tensor], keep: torch.Tensor, progress: float) -> States | TopK | None:
        if self._decoder is None:
            self._decoder = found_decoder(self.student)
        with evaluating(self.student), self.inside():
            found = decoder_states(self._decoder, inputs, keep)
            if found.head.weight.requires_grad:  # "ema" has put its own weights into the student's head
                bias = None if found.head.bias is None else found.head.bias.detach().clone()
                head = found.head._replace(weight=found.head.weight.detach().clone(), bias=bias)
                found = found._replace(head=head)
            return found


class FullRankTeacher(OwnTeacher):
    """The adapter at its full rank teaches the steps at a lower one; at the full rank the labels teach alone."""

    def __init__(self, student: Any) -> None:
        super().__init__(student)
        self.rank = max(student.peft_config[name].r for name in student.active_adapters)

    @contextmanager
    def inside(self) -> Iterator[None]:
        with self.student.base_model.at_rank(self.rank):
            yield

    def outputs(self, inputs: Mapping[str, torch.Tensor], progress: float, **more: Any) -> Any:
        return None if self._full() else super().outputs(inputs, progress, **more)

    def states(self, inputs: Mapping[str, torch.Tensor], keep: torch.Tensor, progress: float) -> States | TopK | None:
        return None if self._full() else super().states(inputs, keep, progress)

    def _full(self) -> bool:
        return self.student.training and self.student.base_model.drawn_rank() >= self.rank


class MeanTeacher(OwnTeacher):
    """The running mean of what is trained, in float32.

    Source: A. Tarvainen, H. Valpola: Mean teachers are better role models, NeurIPS 2017, arXiv 1703.01780.
    """

    def __init__(self, student: Any, decay: float) -> None:
        super().__init__(student)
        self.decay = decay
        self.means: dict[str, torch.Tensor] = {}

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.student.named_parameters() if p.requires_grad}

    def _begin(self) -> None:
        if not self.means:
            self.means = {name: p.detach().float().clone() for name, p in self._trained().items()}

    @contextmanager
    def inside(self) -> Iterator[None]:
        self._begin()
        trained = self._trained()
        own = {name: p.detach().clone() for name, p in trained.items()}
        try:
            with torch.no_grad():
                for name, p in trained.items():
                    p.copy_(self.means[name])
            yield
        finally:
            with torch.no_grad():
                for name, p in trained.items():
                    p.copy_(own[name])

    def updated(self) -> None:
        self._begin()
        with torch.no_grad():
            for name, p in self._trained().items():
                self.means[name].lerp_(p.float(), 1 - self.decay)

    def state(self) -> dict[str, torch.Tensor]:
        self._begin()
        return dict(self.means)

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        places = {name: p.device for name, p in self._trained().items()}
        if set(state) != set(places):
            raise ValueError("teacher='ema': the checkpoint's running mean is of other weights than are trained now.")
        self.means = {name: state[name].to(device) for name, device in places.items()}


def find_teacher(
    teacher: Any,
    student: Any,
    switches: Sequence[float] | None,
    ema_decay: float,
    quantization: Any,
    check: Any,
) -> Teacher | str | None:
    """The teacher that a value of the argument `teacher` means.

    Args:
        teacher: what `KDTrainer` takes.
        student: the model without the trainer's wrappers.
        switches: `teacher_switches`.
        ema_decay: as the field.
        quantization: as in `load_teacher`.
        check: called with each model and its tokenizer (or None) before it teaches; raises to refuse it.

    Returns:
        A `Teacher`; the text for a formula; None for no teacher.

    Raises:
        ValueError, TypeError: there is no such teacher, or the student has none of that kind in it.
    """
    several = isinstance(teacher, list | tuple)
    if switches is not None and not (several and len(teacher) == len(switches) + 1):
        count = f"{len(teacher)} teachers" if several else "one teacher"
        raise ValueError(
            f"teacher_switches={list(switches)!r} are for {len(switches) + 1} teachers, and teacher has {count}: pass "
            "a list of so many, or leave them out."
        )
    if teacher is None or (isinstance(teacher, str) and teacher in FORMULAS):
        return teacher
    if several:
        if not teacher:
            raise ValueError("teacher=[]: must have at least one model or path.")
        equal = [i / len(teacher) for i in range(1, len(teacher))]
        _check_outside(teacher, student)
        return ModelTeacher(teacher, equal if switches is None else switches, student, quantization, check)
    if isinstance(teacher, str) and (teacher in INSIDE or teacher.startswith("adapter:")):
        return _inside(teacher, student, ema_decay)
    if isinstance(teacher, str) and teacher.startswith("cache:"):
        return CachedTeacher(teacher.removeprefix("cache:"), check)
    if isinstance(teacher, nn.Module | str | os.PathLike):
        _check_outside([teacher], student)
        return ModelTeacher([teacher], [], student, quantization, check)
    raise TypeError(f"teacher={teacher!r}: must be {KINDS}.")


def _check_outside(teachers: Sequence[Any], student: Any) -> None:
    for each in teachers:
        if not isinstance(each, nn.Module | str | os.PathLike):
            raise TypeError(f"teacher has {each!r}: a list must hold models or paths.")
        if isinstance(each, str) and (each in (*FORMULAS, *INSIDE) or each.startswith(("adapter:", "cache:"))):
            raise ValueError(f"teacher has {each!r}: a list must hold models or paths.")
        own = {id(p) for p in student.parameters() if p.requires_grad}
        if isinstance(each, nn.Module) and any(id(p) in own for p in each.parameters()):
            raise ValueError(
                "teacher shares trained weights with the student, so training would change it. Pass teacher='base', "
                "'adapter:NAME' or 'ema', or a copy of the model."
            )


def _inside(teacher: str, student: Any, ema_decay: float) -> OwnTeacher:
    if any(map(is_parted, student.parameters())):
        raise ValueError(f"teacher={teacher!r}: ZeRO-3 has parted the student's weights; use ZeRO-2, FSDP2 or DDP.")
    if teacher == "ema":
        return MeanTeacher(student, ema_decay)
    if not hasattr(student, "peft_config"):
        raise ValueError(f"teacher={teacher!r} needs a PeftModel: pass peft_config, or a model from get_peft_model.")
    if teacher == "full_rank":
        return _full_rank(student)
    adapter = teacher.partition(":")[2] or None
    if teacher != "base" and (adapter not in student.peft_config or adapter in student.active_adapters):
        raise ValueError(
            f"teacher={teacher!r} must name an adapter of the model that is not trained: it has "
            f"{sorted(student.peft_config)} and trains {student.active_adapters}. Load one: "
            f"model.load_adapter(path, {adapter!r})."
        )
    for name in student.active_adapters:
        bias = getattr(student.peft_config[name], "bias", "none")
        if bias != "none":
            raise ValueError(
                f"teacher={teacher!r}: {name!r} trains biases of the base model (bias={bias!r}), which stay when it is "
                "switched off, so the teacher would move with the student. Set bias='none', or pass a model as teacher."
            )
    ids = torch.arange(4, device=student.get_input_embeddings().weight.device)[None]
    also = {"decoder_input_ids": ids} if getattr(base_model(student).config, "is_encoder_decoder", False) else {}
    if depends_on_trained(student, adapter, lambda: student(input_ids=ids, **also).logits):
        raise ValueError(
            f"teacher={teacher!r}: with that switch the model still depends on what is trained, so the teacher would "
            "move with the student. Train only an adapter's own weights (a head by modules_to_save), or pass a model."
        )
    if adapter is not None:  # one that add_adapter made would be trained, and decay
        with switched(student, adapter):
            taught = [p for p in student.parameters() if p.requires_grad]
        own = {id(p) for name, p in student.named_parameters() if f".{adapter}." in f"{name}."}
        for p in taught:
            if id(p) in own:
                p.requires_grad_(False)
    return OwnTeacher(student, adapter)


def _full_rank(student: Any) -> OwnTeacher:
    if not hasattr(student.base_model, "drawn_rank"):
        names = {name: config.peft_type for name, config in student.peft_config.items()}
        raise ValueError(
            f"teacher='full_rank' is for an adapter that draws ranks while it trains, and the model has {names}: use "
            "DyLoRAConfig(rank_sampling='uniform')."
        )
    for name in student.active_adapters:
        if getattr(student.peft_config[name], "rank_sampling", None) == "full":
            raise ValueError(
                f"teacher='full_rank': the adapter {name!r} trains at its full rank alone (rank_sampling='full'), so "
                "there is no step to teach. Use rank_sampling='mostly_full' or 'uniform'."
            )
    return FullRankTeacher(student)
