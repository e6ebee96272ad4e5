"""Settings of a distillation: how much the teacher counts, how it is compared, and how both move with the training."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Self

from transformers import TrainingArguments

from peft_dynamic.functional.distill import DIVERGENCES
from peft_dynamic.functional.schedule import moving, stairs
from peft_dynamic.rules import is_finite, is_int
from peft_dynamic.trainers.kd.features import KINDS as FEATURES
from peft_dynamic.trainers.kd.features import parse_pairs, parse_weights
from peft_dynamic.trainers.kd.noise import KINDS

_MOVES = "A number, knots such as '0:0.1 1:1', or stairs such as 'steps 0:0 0.78:1' over the progress of the training."


# transformers' parser takes the second member of a union of which None is the third: a command line gives a text. None
# itself is refused.
@dataclass
class DistillFields:
    """What `KDConfig` adds to `TrainingArguments`, and `KDSFTConfig` to `SFTConfig`.

    With lambda the weight, l the loss of a row's label and d the divergence from its teacher, a row loses

        (1 - lambda) l + lambda d

    and the rows of a step are averaged. "Moves" means: a number, or a `Schedule`'s text over the progress of the
    training, `"0:0.1 1:1"` for a line from 0.1 to 1, `"steps 0:0 0.78:1"` for 0, and 1 from 78 % of the steps on.

    Args:
        kd_weight: lambda, from 0 to 1; moves. Without a teacher, and with teacher="smoothing", it has no meaning.
        temperature: T > 0 of both softmaxes; moves.
        teacher_scale: phi > 0, the factor of the teacher's logits; moves.
        divergence: "forward_kl", "reverse_kl", "jsd", "mse" or "hinge": equations (1) to (5) of
            `peft_dynamic.functional.distill`. Regression has the squared difference in place of the first and "mse".
        margin: m of the hinge, in squared logits summed over classes.
        smoothing: a of teacher="smoothing"; and of teacher="manual", which is 1 - a sure of each label.
        teacher_switches: for a list of N teachers the N - 1 progresses at which the next one takes over, increasing;
            None for N equal parts.
        ema_decay: of teacher="ema": the share of the running mean that stays at each optimizer step.
        sample_weights: "meta" for a lambda of each row, in place of `kd_weight`: RW-KD's. A classifier's rows follow
            the label or the teacher, whichever lowers the loss of training rows that are set aside; see
            `peft_dynamic.functional.sample_weights`. Rows without a label have the teacher's term alone.
        meta_fraction: the share of the training rows that are set aside for it, and not trained on.
        label_noise: what becomes of a classifier's rows whose labels the teacher finds the least likely: "drop" leaves
            their labels out, so that they have the teacher's term alone; "relabel" gives them the teacher's class.
        noise_rate: their share of all training rows with a label.
        features: further terms of the loss, with their weights: "relations" of MiniLMv2, "hidden" for squared
            differences of states, "cosine" for their angles; see `peft_dynamic.functional.features`. A dict, or a text
            such as "relations:1 hidden:0.5". States of different widths are matched by a matrix that is trained.
        layer_map: which layers they compare: "last" for the last ones; "uniform" for each of the student's with one of
            the teacher's, evenly; "skip" for the same without the last; or pairs from 1 such as "1:2 2:4".
        relation_heads: into how many heads queries, keys and values are cut; must divide the widths of both models.
            None for the student's.
        average_from: leave the mean of the weights after each step from this progress on, in place of the last ones
            (SWA); of a LoRA the mean of the products B A, at its rank. The rate is better constant there. None for no
            mean.

    Raises:
        ValueError, TypeError: a value has no meaning, or none beside another.
    """

    kd_weight: float | str | None = field(
        default=0.5, metadata={"help": f"Weight of the teacher's term, 0 to 1; the labels' has the rest. {_MOVES}"}
    )
    temperature: float | str | None = field(default=1.0, metadata={"help": f"Temperature of both softmaxes. {_MOVES}"})
    teacher_scale: float | str | None = field(
        default=1.0, metadata={"help": f"Factor of the teacher's logits. {_MOVES}"}
    )
    divergence: str = field(
        default="forward_kl", metadata={"help": f"How rows are compared: {', '.join(DIVERGENCES)}."}
    )
    margin: float = field(
        default=0.0, metadata={"help": "Of the hinge: squared logits, summed over the classes, that cost nothing."}
    )
    smoothing: float = field(
        default=0.1, metadata={"help": "Of teacher='smoothing' and 'manual': the probability that the label loses."}
    )
    teacher_switches: list[float] | None = field(
        default=None,
        metadata={"help": "Of a list of teachers: the progresses, 0 to 1, at which the next one takes over."},
    )
    ema_decay: float = field(
        default=0.999, metadata={"help": "Of teacher='ema': the share of the running mean that stays at each step."}
    )
    sample_weights: str | None = field(
        default=None,
        metadata={"help": "'meta': find the teacher's weight of each row on rows that are set aside (RW-KD)."},
    )
    meta_fraction: float = field(
        default=0.1, metadata={"help": "Of sample_weights: the share of the training rows that are set aside."}
    )
    label_noise: str | None = field(
        default=None,
        metadata={"help": "'drop' or 'relabel' (by the teacher) the labels that the teacher finds the least likely."},
    )
    noise_rate: float = field(
        default=0.0, metadata={"help": "Of label_noise: the share of the training rows' labels, 0 to 1."}
    )
    features: dict[str, float] | str | None = field(
        default=None,
        metadata={"help": f"Inner states to compare, with weights: {', '.join(FEATURES)}, as in 'hidden:1'."},
    )
    layer_map: str = field(
        default="last",
        metadata={"help": "Of features: 'last', 'uniform', 'skip', or pairs of layers from 1, such as '1:2 2:4'."},
    )
    relation_heads: int | None = field(
        default=None, metadata={"help": "Of the relations: heads, which divide both widths; default the student's."}
    )
    average_from: float | None = field(
        default=None,
        metadata={"help": "Progress, 0 to 1, from which on weights are averaged; their mean is left (SWA)."},
    )

    def check_distillation(self) -> None:
        """Raise for what has no meaning; texts that are numbers become numbers, as from a command line.

        Raises:
            ValueError, TypeError: as the class says.
        """
        for name, (rule, holds) in _MOVING.items():
            setattr(self, name, moving(name, getattr(self, name), rule, holds))
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"divergence={self.divergence!r}: must be one of {', '.join(DIVERGENCES)}.")
        for name, (rule, holds) in _FIXED.items():
            if not holds(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)!r}: must be {rule}.")
        self._check_together()

    def _check_together(self) -> None:
        smoothing = getattr(self, "label_smoothing_factor", 0)
        if smoothing:
            raise ValueError(
                f"label_smoothing_factor={smoothing}: here it is teacher='smoothing', with the factor as `smoothing`."
            )
        if self.margin and self.divergence != "hinge":
            raise ValueError(
                f"margin={self.margin} is the hinge's, and divergence={self.divergence!r} has none: set margin=0, or "
                "divergence='hinge'."
            )
        if self.divergence in ("mse", "hinge") and self.temperature != 1.0:
            raise ValueError(
                f"temperature={self.temperature!r}: divergence={self.divergence!r} compares logits, not softmaxes, so "
                "it has no temperature. Leave it at 1; teacher_scale scales the teacher's logits."
            )
        self._check_rows()
        if self.average_from is not None and getattr(self, "load_best_model_at_end", False):
            raise ValueError(
                f"average_from={self.average_from} and load_best_model_at_end: one leaves the mean of the last "
                "weights, the other the best checkpoint. Leave one out."
            )
        self.features = parse_weights(self.features)
        parse_pairs(self.layer_map)
        if self.features is None and (self.layer_map != "last" or self.relation_heads is not None):
            raise ValueError(
                f"layer_map={self.layer_map!r}, relation_heads={self.relation_heads}: they are for features, which is "
                "None. Set features={'relations': 1.0}, or leave them out."
            )
        if self.relation_heads is not None and not (is_int(self.relation_heads) and self.relation_heads > 0):
            raise ValueError(f"relation_heads={self.relation_heads!r}: must be a whole number of at least 1, or None.")
        switches = self.teacher_switches
        if switches is not None:
            rising = isinstance(switches, list | tuple) and all(is_finite(at) and 0 < at < 1 for at in switches)
            if not rising or any(a >= b for a, b in pairwise(switches)):
                raise ValueError(f"teacher_switches={switches!r}: must be progresses between 0 and 1, increasing.")

    def _check_rows(self) -> None:
        if self.sample_weights not in (None, "meta"):
            raise ValueError(f"sample_weights={self.sample_weights!r}: must be 'meta' or None.")
        if self.sample_weights is not None and self.kd_weight != 0.5:
            raise ValueError(
                f"kd_weight={self.kd_weight!r}: sample_weights={self.sample_weights!r} finds the weight of each row "
                "itself. Leave kd_weight at 0.5, or sample_weights out."
            )
        if self.label_noise is not None and self.label_noise not in KINDS:
            raise ValueError(f"label_noise={self.label_noise!r}: must be {' or '.join(map(repr, KINDS))}, or None.")
        if (self.label_noise is None) != (self.noise_rate == 0):
            raise ValueError(
                f"label_noise={self.label_noise!r} with noise_rate={self.noise_rate}: set both, or leave both out. The "
                "rate is the share of labels to suspect, such as 0.1."
            )
        if self.label_noise is not None and self.sample_weights is not None:
            raise ValueError(
                f"label_noise={self.label_noise!r} and sample_weights={self.sample_weights!r} both judge each row's "
                "label: leave one out."
            )
        if self.sample_weights is None and self.meta_fraction != 0.1:
            raise ValueError(
                f"meta_fraction={self.meta_fraction} is for sample_weights='meta', which is None. Set both or neither."
            )

    @classmethod
    def annealing(cls, *args: Any, k: int = 14, m: int = 4, tau_max: int = 7, **settings: Any) -> Self:
        """Annealing-KD: k epochs on the teacher's logits, which grow to their size, then m on the labels.

        In phase 1 the loss is the mean square of z_S - phi z_T; phi goes from 1/tau_max to 1 in tau_max equal stairs.
        In phase 2 it is the cross entropy. Only the ratio of k to m counts here: num_train_epochs says how many.

        Differs from the authors' code: phi never passes 1, k need be no multiple of tau_max, and phase 2 goes on from
        the last weights of phase 1, not from its best checkpoint.

        Args:
            *args: as for the class itself.
            **settings: as for the class itself; they win over the preset's.
            k: epochs on the teacher.
            m: epochs on the labels.
            tau_max: in how many stairs the teacher's logits grow; at least 1.

        Source: A. Jafari, M. Rezagholizadeh, P. Sharma, A. Ghodsi, EACL 2021, arXiv 2104.07163.
        """
        _check_counts(k=k, m=m, tau_max=tau_max)
        share = k / (k + m)
        fields = {
            "divergence": "mse",
            "kd_weight": stairs((0.0, 1.0), (share, 0.0)),
            "teacher_scale": stairs(*((j * k / (tau_max * (k + m)), (j + 1) / tau_max) for j in range(tau_max))),
        }
        return cls(*args, **{**fields, **settings})

    @classmethod
    def continuation(
        cls, *args: Any, margin: float, n: int = 30, tau_max: int = 10, ramp: int = 40, until: int = 20, **settings: Any
    ) -> Self:
        """Continuation-KD: from the teacher's scaled logits to the labels, with a margin that costs nothing.

        In epoch i the labels have the weight i/ramp, and all of it after epoch `until`; phi falls a stair short of
        1 for long, as tau, from tau_max, falls by one in each epoch that floor(n/tau_max) divides. The defaults are the
        paper's for GLUE. Its CIFAR run is n=200, tau_max=20, ramp=150, until=149.

        Differs from the paper's formula: tau stays at 1 at the end, where it would fall to 0.

        Args:
            *args: as for the class itself.
            **settings: as for the class itself; they win over the preset's.
            margin: m, in squared logits summed over classes. The paper gives none, so there is no default.
            n: epochs, in which the schedule counts; num_train_epochs says how many there are.
            tau_max: the first tau, at most n.
            ramp: the labels' weight is i/ramp in epoch i.
            until: the last epoch of the ramp, at most ramp and less than n.

        Source: A. Jafari, I. Kobyzev, M. Rezagholizadeh, P. Poupart, A. Ghodsi, Findings of EMNLP 2022,
        arXiv 2212.05998.
        """
        _check_counts(n=n, tau_max=tau_max, ramp=ramp, until=until)
        if tau_max > n or until > ramp or until >= n:
            raise ValueError(
                f"n={n}, tau_max={tau_max}, ramp={ramp}, until={until}: tau_max must be at most n, until at most ramp "
                "and less than n."
            )
        every = n // tau_max
        fields = {
            "divergence": "hinge",
            "margin": margin,
            "kd_weight": stairs(*(((i - 1) / n, 1 - i / ramp) for i in range(1, until + 1)), (until / n, 0.0)),
            "teacher_scale": stairs(
                (0.0, (2 if every == 1 else 1) / tau_max if tau_max > 1 else 1.0),
                *(((j * every - 1) / n, min(1.0, (1 + j) / tau_max)) for j in range(1, tau_max) if j * every > 1),
            ),
        }
        return cls(*args, **{**fields, **settings})

    @classmethod
    def pro_kd(cls, *args: Any, checkpoints: int, k: int = 14, m: int = 4, **settings: Any) -> Self:
        """Pro-KD: the teacher's checkpoints teach one after the other, oldest first, then the labels.

        The paper's equation was not read: that phase 1 has the squared difference of the logits, and that phi grows to
        1 over the checkpoints, are taken from accounts of it. Pass the list of checkpoints as `teacher`.

        Args:
            *args: as for the class itself.
            **settings: as for the class itself; they win over the preset's.
            checkpoints: how many there are.
            k: epochs on the teachers; each has an equal part.
            m: epochs on the labels. As in `annealing`, only the ratio counts.

        Source: M. Rezagholizadeh, A. Jafari, P. S. M. Saladi, P. Sharma, A. S. Pasand, A. Ghodsi: Pro-KD, COLING 2022,
        arXiv 2110.08532.
        """
        _check_counts(checkpoints=checkpoints, k=k, m=m)
        share = k / (k + m)
        switches = [j * k / (checkpoints * (k + m)) for j in range(1, checkpoints)]
        fields = {
            "divergence": "mse",
            "kd_weight": stairs((0.0, 1.0), (share, 0.0)),
            "teacher_scale": stairs(*((at, (j + 1) / checkpoints) for j, at in enumerate([0.0, *switches]))),
            "teacher_switches": switches or None,
        }
        return cls(*args, **{**fields, **settings})

    @classmethod
    def rw_kd(cls, *args: Any, meta_fraction: float = 0.1, **settings: Any) -> Self:
        """RW-KD: each row follows its label or its teacher, by what helps rows that are set aside.

        Differs from the paper's algorithm, which takes a derivative of a derivative: a difference of two passes gives
        the same weights. One batch of the rows set aside serves a whole optimizer step. There is no bound on how far
        weights move from step to step; expect noise in them.

        Args:
            *args: as for the class itself.
            **settings: as for the class itself; they win over the preset's.
            meta_fraction: the share of the training rows that are set aside, and not trained on.

        Source: P. Lu, A. Ghaddar, A. Rashid, M. Rezagholizadeh, A. Ghodsi, P. Langlais, Findings of EMNLP 2021.
        """
        return cls(*args, **{"sample_weights": "meta", "meta_fraction": meta_fraction, **settings})

    @classmethod
    def noisy(cls, *args: Any, rate: float, **settings: Any) -> Self:
        """Training rows of which a share has wrong labels: the labels that the teacher finds the least likely go.

        The paper's own procedures were not read: that rows of large loss are left to the other model is taken from
        accounts of it. There two models choose for each other in each batch; here the teacher chooses once, among all
        training rows. `label_noise="relabel"` is the other remedy, the teacher's class for the label.

        Args:
            *args: as for the class itself.
            **settings: as for the class itself; they win over the preset's.
            rate: the share of wrong labels, as you know or guess it. There is no default.

        Source: Knowledge Distillation with Noisy Labels for Natural Language Understanding, W-NUT 2021,
        arXiv 2109.10147.
        """
        return cls(*args, **{"label_noise": "drop", "noise_rate": rate, **settings})

    @classmethod
    def minilm(cls, *args: Any, relation_heads: int | None = None, **settings: Any) -> Self:
        """MiniLMv2: the student's last layer learns the relations of the teacher's, beside the labels.

        Widths and numbers of heads may differ. Differs from the paper, which pretrains on the relations alone: here the
        labels count too, but for a classifier's rows that have none. For large teachers the paper takes a layer below
        the last, such as `layer_map="6:19"` of 24.

        Args:
            *args: as for the class itself.
            **settings: as for the class itself; they win over the preset's.
            relation_heads: into how many heads queries, keys and values are cut; the paper has 48 for BERT-base. None
                for the student's.

        Source: W. Wang, H. Bao, S. Huang, L. Dong, F. Wei, Findings of ACL 2021, arXiv 2012.15828.
        """
        fields = {"features": {"relations": 1.0}, "kd_weight": 0.0, "relation_heads": relation_heads}
        return cls(*args, **{**fields, **settings})


@dataclass
class KDConfig(DistillFields, TrainingArguments):
    """`TrainingArguments` with the settings of a distillation; see `DistillFields` for them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_distillation()
        if self.sample_weights is not None and (self.bf16 or self.fp16):
            raise ValueError(
                "sample_weights='meta' takes small differences of losses, which half precision rounds away. Set "
                "bf16=False and fp16=False, or leave sample_weights out."
            )


_MOVING = {
    "kd_weight": ("from 0 to 1", lambda value: 0 <= value <= 1),
    "temperature": ("greater than 0", lambda value: value > 0),
    "teacher_scale": ("greater than 0", lambda value: value > 0),
}
_FIXED = {
    "margin": ("a finite number of at least 0", lambda value: is_finite(value) and value >= 0),
    "smoothing": ("a number greater than 0 and less than 1", lambda value: is_finite(value) and 0 < value < 1),
    "meta_fraction": ("a number greater than 0 and less than 1", lambda value: is_finite(value) and 0 < value < 1),
    "average_from": (
        "a number from 0 to less than 1, or None",
        lambda value: value is None or (is_finite(value) and 0 <= value < 1),
    ),
    "noise_rate": ("a number from 0 to less than 1", lambda value: is_finite(value) and 0 <= value < 1),
    "ema_decay": ("a number from 0 to less than 1", lambda value: is_finite(value) and 0 <= value < 1),
}


def _check_counts(**counts: Any) -> None:
    for name, value in counts.items():
        if not is_int(value) or value < 1:
            raise ValueError(f"{name}={value!r}: must be a whole number of at least 1.")
