"""What a student, its teacher and the settings must be to each other: asked before anything is trained."""

from __future__ import annotations

import warnings
from typing import Any

from peft_dynamic.hosts.blocks import base_model
from peft_dynamic.trainers.kd.cache import Cache, vocabulary_of
from peft_dynamic.trainers.kd.tasks import task_of
from peft_dynamic.trainers.kd.teachers import FullRankTeacher, MeanTeacher, ModelTeacher, Teacher


def check_student(distiller: Any, teacher: Any) -> None:
    """Raise for a student that cannot be trained on this loss, or with this kind of teacher."""
    base = base_model(distiller.student)
    if distiller.task != "sequence" and any(
        getattr(each, "is_prompt_learning", False) for each in getattr(distiller.student, "peft_config", {}).values()
    ):
        raise ValueError(
            "prompt learning puts tokens in front of the student's that the teacher does not have: use an adapter "
            "in the layers, such as LoRA."
        )
    config = base.config
    if getattr(config, "output_router_logits", False) and getattr(config, "router_aux_loss_coef", 0):
        raise ValueError(
            f"router_aux_loss_coef={config.router_aux_loss_coef}: the loss of the routers is no part of this one; "
            "set output_router_logits=False in the model's config."
        )
    if getattr(config, "problem_type", None) == "multi_label_classification":
        raise ValueError("problem_type='multi_label_classification': a row must have one label, or a number.")
    if not distiller.regression:
        return
    if config.num_labels != 1:
        raise ValueError(f"problem_type='regression' with num_labels={config.num_labels}: must be 1.")
    if isinstance(teacher, str) and teacher in ("smoothing", "manual"):
        raise ValueError(f"teacher={teacher!r} is for classes, and the student gives a number.")
    if distiller.config.divergence not in ("forward_kl", "mse"):
        raise ValueError(
            f"divergence={distiller.config.divergence!r}: regression has the squared difference; leave it out."
        )
    if distiller.config.temperature != 1.0:
        raise ValueError(f"temperature={distiller.config.temperature!r}: a number has none; leave it at 1.")


def check_rows(distiller: Any) -> None:
    """Raise for weights of single rows where there are no such rows, or no two losses to weigh."""
    asked = distiller.config.sample_weights
    if asked is None:
        return
    if distiller.task != "sequence":
        raise ValueError(
            f"sample_weights={asked!r} weighs the rows of a classifier of sequences, and the student's task is "
            f"{distiller.task!r}. Leave it out; kd_weight weighs all tokens alike."
        )
    if not isinstance(distiller.teacher, Teacher) or isinstance(distiller.teacher, FullRankTeacher):
        full = isinstance(distiller.teacher, FullRankTeacher)
        kind = "'full_rank', the student as it is in these passes" if full else repr(distiller.teacher)
        raise ValueError(
            f"sample_weights={asked!r} weighs each row's label against its teacher, and teacher is {kind}. Pass a "
            "model, a path, a cache, 'base', 'adapter:NAME' or 'ema'."
        )


def check_noise(distiller: Any) -> None:
    """Raise for noise in labels that are no classes of whole rows, or where no one teacher judges them."""
    asked, teacher = distiller.config.label_noise, distiller.teacher
    if asked is None:
        return
    if distiller.task != "sequence" or distiller.regression:
        kind = "a number" if distiller.regression else f"of the task {distiller.task!r}"
        raise ValueError(
            f"label_noise={asked!r} judges the classes of whole rows, and the student's labels are {kind}. Leave "
            "it and noise_rate out."
        )
    moves = isinstance(teacher, FullRankTeacher | MeanTeacher)
    several = isinstance(teacher, ModelTeacher) and len(teacher.teachers) > 1
    if not isinstance(teacher, Teacher) or moves or several:
        kind = "a list" if several else "one that moves" if moves else repr(teacher)
        raise ValueError(
            f"label_noise={asked!r}: one teacher judges all labels before the training, and teacher is {kind}. "
            "Pass a model, a path, a cache, 'base' or 'adapter:NAME'."
        )


def check_teacher(distiller: Any, teacher: Any, tokenizer: Any) -> None:
    """Raise unless the teacher reads the student's tokens and answers in its classes."""
    if isinstance(teacher, Cache):
        _check_cache(distiller, teacher)
        return
    if task_of(teacher) != distiller.task:
        raise ValueError(
            f"teacher is a {type(base_model(teacher)).__name__} and the student a "
            f"{type(base_model(distiller.student)).__name__}: both must have the same task."
        )
    one, other = base_model(distiller.student).config, base_model(teacher).config
    own, theirs = (config.get_text_config().vocab_size for config in (one, other))
    tokens = distiller.processing_class
    if hasattr(tokens, "get_vocab") and hasattr(tokenizer, "get_vocab"):
        if tokens.get_vocab() != tokenizer.get_vocab():
            raise ValueError(
                "the teacher's tokenizer has other tokens than the student's, so that their ids mean other words. "
                "Across tokenizers use TRL's GOLDTrainer (trl.experimental.gold)."
            )
    elif own != theirs:
        raise ValueError(
            f"the student has vocab_size {own} and the teacher {theirs}, and there are no two tokenizers to tell "
            "whether they differ in padding only: pass processing_class, and the teacher as a path with its "
            "tokenizer."
        )
    if distiller.task in ("sequence", "tokens"):
        _check_classes(one, other)
    elif own != theirs:
        distiller.width = min(own, theirs)
        warnings.warn(
            f"the student's vocabulary has {own} rows and the teacher's {theirs}, of one tokenizer: the teacher is "
            f"compared over the first {distiller.width}.",
            stacklevel=4,
        )


def _check_cache(distiller: Any, cache: Cache) -> None:
    said, where = cache.meta, f"teacher='cache:{cache.folder}'"
    if said["task"] != distiller.task:
        raise ValueError(f"{where} was filled by a {said['task']} model, and the student is {distiller.task}.")
    own = vocabulary_of(distiller.processing_class)
    if own is not None and said["vocabulary"] is not None and own != said["vocabulary"]:
        raise ValueError(f"{where}: its tokenizer has other tokens than the student's. Fill it with that tokenizer.")
    config, settings = base_model(distiller.student).config, distiller.config
    if distiller.task == "sequence":
        if said["classes"] != config.num_labels:
            raise ValueError(f"{where} has {said['classes']} classes and the student {config.num_labels}.")
        return
    if said["width"] != config.get_text_config().vocab_size and own is None:
        raise ValueError(
            f"{where} has a vocabulary of {said['width']} rows and the student one of "
            f"{config.get_text_config().vocab_size}: pass processing_class to tell whether they differ in padding "
            "only."
        )
    moved = settings.divergence != "forward_kl" or settings.temperature != 1.0 or settings.teacher_scale != 1.0
    if said["kind"] == "top_k" and moved:
        raise ValueError(
            f"{where} has the likeliest tokens alone, which say nothing at another temperature, scale or "
            f"divergence (temperature={settings.temperature!r}, teacher_scale={settings.teacher_scale!r}, "
            f"divergence={settings.divergence!r}). Leave them at their defaults, or fill a cache of "
            "kind='states'."
        )


def _check_classes(one: Any, other: Any) -> None:
    if one.num_labels != other.num_labels:
        raise ValueError(f"num_labels: the student has {one.num_labels} classes and the teacher {other.num_labels}.")
    names = [[config.id2label[i] for i in range(config.num_labels)] for config in (one, other)]
    named = all(not all(str(name).startswith("LABEL_") for name in each) for each in names)
    if named and names[0] != names[1]:
        raise ValueError(
            f"id2label: the student's classes are {names[0]} and the teacher's {names[1]}: give both the same "
            "names in the same order."
        )
