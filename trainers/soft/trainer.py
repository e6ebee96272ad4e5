"""SoFT on TRL's SFTTrainer: one run, many depths; see forward.py for how the losses are computed."""

from __future__ import annotations

from typing import Any

from transformers import TrainingArguments

from peft_dynamic.functional.kd_loss import Distillation
from peft_dynamic.functional.schedule import Schedule
from peft_dynamic.rules import taken_from
from peft_dynamic.trainers.soft.base import StatesTrainer
from peft_dynamic.trainers.soft.config import SoFTConfig, draw_exits
from peft_dynamic.trainers.soft.forward import ExitOutput  # noqa: F401  # where it was before

_CITATION = """\
@inproceedings{kavehzadeh2024sorted,
    title = {{Sorted LLaMA: Unlocking the Potential of Intermediate Layers of Large Language Models for
        Dynamic Inference}},
    author = {Parsa Kavehzadeh and Mojtaba Valipour and Marzieh Tahaei and Ali Ghodsi and Boxing Chen and
        Mehdi Rezagholizadeh},
    booktitle = {Findings of the Association for Computational Linguistics: EACL 2024},
    year = 2024
}"""


class SoFTTrainer(StatesTrainer):
    """Fine-tunes a causal language model so that it can be left after any of several depths (SoFT).

    Takes what `trl.SFTTrainer` takes, with a `SoFTConfig` as `args`: text, chat, prompt and completion, packing,
    padding-free batches, assistant-only loss, any PEFT adapter, quantised base models, checkpointing and resume. The
    loss is the weighted mean of the exits' losses. An exit's loss is that of the model cut to it, with the final norm
    and the head shared. It is divided by the number of labelled tokens in the step, as `SFTTrainer` does.

    `eval_loss` is one mean over the labelled tokens of all batches and processes. With `exit_kd` the shallower exits
    also learn from the full depth, in the same forward pass.

    Logged are `exit_<depth>_loss` for each exit, in training and evaluation. With `exit_kd` there are `exit_<depth>_kd`
    and `exit_<depth>_agreement` too. Of `SFTTrainer`'s metrics there are `num_tokens` and the full depth's
    `mean_token_accuracy`, but not `entropy`.

        settings = SoFTConfig("out", exits=[1, 2], max_steps=1, bf16=torch.cuda.is_available())
        SoFTTrainer("my/model", settings, train_dataset=texts).train()

    Args:
        model, data_collator, train_dataset, ...: as for `trl.SFTTrainer`.
        args: a `SoFTConfig`; None for its defaults.

    Raises:
        ValueError: before any training, for what exits do not work with: an architecture without a list of layers, a
            final norm and a plain head; an adapter on the head; a router's loss; `compute_loss_func`; sequence, context
            and tensor parallelism; `nn.DataParallel`.

    Source: P. Kavehzadeh, M. Valipour, M. Tahaei, A. Ghodsi, B. Chen, M. Rezagholizadeh: Sorted LLaMA: Unlocking the
    Potential of Intermediate Layers of Large Language Models for Dynamic Inference, Findings of EACL 2024,
    arXiv 2309.08968.
    """

    args: SoFTConfig
    _tag_names = ["trl", "soft"]  # noqa: RUF012  # TRL's
    _name = "SoFT"
    _paper = {  # noqa: RUF012  # TRL's
        "title": "Sorted LLaMA: Unlocking the Potential of Intermediate Layers of Large Language Models for Dynamic "
        "Inference",
        "id": "2309.08968",
        "citation": _CITATION,
    }

    def __init__(self, model: Any, args: TrainingArguments | None = None, *positional: Any, **kwargs: Any) -> None:
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func: the loss of SoFT is that of its exits; leave it out.")
        super().__init__(model, _soft_args(model, args), *positional, **kwargs)
        self.begin()
        self.exits = self.args.trained_exits(self.decoder.depth)
        self.eval_exits = self.args.evaluated_exits(self.decoder.depth)
        self._check_trained(self.exits[0])
        self.exit_weights = dict(zip(self.exits, self.args.exit_weights or [1.0] * len(self.exits), strict=True))
        self._kd, self._kd_temperature = map(Schedule.parse, (self.args.exit_kd, self.args.exit_kd_temperature))

    def _check_trained(self, shallowest: int) -> None:
        """Raise if all that is trained lies behind the shallowest exit."""
        deeper = {id(p) for layer in self.decoder.layers[shallowest:] for p in layer.parameters()}
        if not any(p.requires_grad and id(p) not in deeper for p in self.model.parameters()):
            raise ValueError(
                f"exits={self.exits}: nothing that is trained lies in front of exit {shallowest}. Leave that exit out, "
                "or train shallower layers too (an adapter's layers_to_transform and target_modules say which)."
            )

    def exits_of(self, mode: str) -> tuple[list[int], list[float]]:
        """The exits of this pass and their weights, which sum to 1."""
        if mode == "eval" and self.args.eval_exits is not None:
            return self.eval_exits, [1 / len(self.eval_exits)] * len(self.eval_exits)
        others = self.args.exits_per_step if mode == "train" else None
        exits = draw_exits(self.exits, others, self.args.seed, self.state.global_step)
        weights = [self.exit_weights[k] for k in exits]
        return exits, [weight / sum(weights) for weight in weights]

    def distillation(self, mode: str, inputs: dict[str, Any]) -> Distillation | None:
        """The full depth teaches the shallower exits, while training; see `exit_kd`."""
        weight = self._kd(self.progress)
        if mode == "eval" or weight == 0:
            return None
        return Distillation("last", weight, self._kd_temperature(self.progress))


def _soft_args(model: Any, args: TrainingArguments | None) -> SoFTConfig:
    """A `SoFTConfig` of any training arguments, as SFTTrainer makes its own."""
    if args is None:
        name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
        return SoFTConfig(f"{name.rstrip('/').split('/')[-1]}-SoFT")
    return args if isinstance(args, SoFTConfig) else taken_from(SoFTConfig, args)
