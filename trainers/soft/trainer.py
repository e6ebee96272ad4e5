"""SoFT on TRL's SFTTrainer: one run, many depths.

Notable: all exits' losses come from one pass of the backbone, inside the model's forward, where DDP and FSDP expect
them. Hooks take the states of the layers, the tokens without a label are dropped, and what is left goes through the
model's own norm and head in `exit_losses`, which holds no more than one chunk of logits.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from peft import PeftType
from torch import nn
from transformers import TrainingArguments
from transformers.utils import ModelOutput

from peft_dynamic._extras import how_to_install
from peft_dynamic.functional.exit_loss import IGNORED, exit_losses
from peft_dynamic.hosts.decoder import Decoder, check_decoder, find_decoder, layer_state
from peft_dynamic.hosts.deepspeed import gather_with, gathering
from peft_dynamic.hosts.offload import whole
from peft_dynamic.hosts.quantization import unpack_bnb_4bit
from peft_dynamic.hosts.repeated import real_rows
from peft_dynamic.trainers.soft.config import SoFTConfig, draw_exits

try:
    from trl import SFTTrainer
except ImportError as error:
    raise ImportError(f"SoFTTrainer needs TRL. {how_to_install('trl', 'trl>=1.16', 'datasets')}") from error

_CITATION = """\
@inproceedings{kavehzadeh2024sorted,
    title = {{Sorted LLaMA: Unlocking the Potential of Intermediate Layers of Large Language Models for
        Dynamic Inference}},
    author = {Parsa Kavehzadeh and Mojtaba Valipour and Marzieh Tahaei and Ali Ghodsi and Boxing Chen and
        Mehdi Rezagholizadeh},
    booktitle = {Findings of the Association for Computational Linguistics: EACL 2024},
    year = 2024
}"""


@dataclass
class ExitOutput(ModelOutput):
    """What the model returns for `exits=[...]`, of E exits; the sums go over the labelled tokens.

    Attributes:
        loss: () the weighted sum of `nll`, with gradients.
        nll: (E,) the exits' summed losses.
        correct: (E,) how many tokens each exit finds likeliest.
        tokens: () how many tokens have a label.
    """

    loss: torch.Tensor | None = None
    nll: torch.Tensor | None = None
    correct: torch.Tensor | None = None
    tokens: torch.Tensor | None = None


class SoFTTrainer(SFTTrainer):
    """Fine-tunes a causal language model so that it can be left after any of several depths (SoFT).

    Takes what `trl.SFTTrainer` takes, with a `SoFTConfig` as `args`: text, chat, prompt and completion, packing,
    padding-free batches, assistant-only loss, any PEFT adapter, quantised base models, checkpointing and resume. The
    loss is the weighted mean over the exits of the loss of the model cut to each exit, with the final norm and the head
    shared, divided by the number of labelled tokens in the step as `SFTTrainer` does.

    Overrides `__init__` (checks, and one more wrapper around the model's forward), `compute_loss`, and of
    `evaluation_loop` the loss, which is one mean over the labelled tokens of all batches and processes.
    Logged are `exit_<depth>_loss` for each exit, in training and evaluation, and of `SFTTrainer`'s metrics `num_tokens`
    and the full depth's `mean_token_accuracy`, but not `entropy`.

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
        self.decoder = find_decoder(self.model)
        self._check_setting()
        unpack_bnb_4bit(self.model)
        with gathering(self.model):
            check_decoder(self.decoder)
        self.exits = self.args.trained_exits(self.decoder.depth)
        self.eval_exits = self.args.evaluated_exits(self.decoder.depth)
        self._check_trained(self.exits[0])
        self.exit_weights = dict(zip(self.exits, self.args.exit_weights or [1.0] * len(self.exits), strict=True))
        # Of a forward without **kwargs Trainer thinks that it cannot divide by the tokens of a whole step; ours does.
        self.model_accepts_loss_kwargs = True
        self._sums: dict[tuple[str, str], tuple[float, float]] = {}  # (mode, metric): its sum and its tokens
        self._evaluated = (0.0, 0.0)  # the same of the loss of this evaluation
        _add_exits(self.decoder, self.model)

    def _check_setting(self) -> None:
        """Raise for what cannot work, as far as `SFTTrainer` has not."""
        kind = type(self.decoder.model).__name__
        if self.aux_loss_enabled:
            raise ValueError(
                f"router_aux_loss_coef={self.router_aux_loss_coef}: the auxiliary loss of {kind}'s routers is that of "
                "the whole model and belongs to no exit; set router_aux_loss_coef=0.0."
            )
        configs = getattr(self.model, "peft_config", {})
        if any(config.peft_type == PeftType.CPT for config in configs.values()):
            raise ValueError("CPTConfig: context-aware prompt tuning makes its own loss from logits; use PromptTuning.")
        parallel = self.accelerator.parallelism_config
        if parallel is not None and (parallel.sp_enabled or parallel.cp_enabled or parallel.tp_enabled):
            raise ValueError(
                f"parallelism_config={parallel}: sequence, context and tensor parallelism split what the exits' losses "
                "need whole; use DDP or FSDP."
            )

    def _check_trained(self, shallowest: int) -> None:
        """Raise if all that is trained lies behind the shallowest exit."""
        deeper = {id(p) for layer in self.decoder.layers[shallowest:] for p in layer.parameters()}
        if not any(p.requires_grad and id(p) not in deeper for p in self.model.parameters()):
            raise ValueError(
                f"exits={self.exits}: nothing that is trained lies in front of exit {shallowest}. Leave that exit out, "
                "or train shallower layers too (an adapter's layers_to_transform and target_modules say which)."
            )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        mode = "train" if self.model.training else "eval"
        exits, weights = self._exits_of(mode)
        if mode == "eval":
            inputs = self._without_repeated_rows(inputs)
        output = model(**inputs, exits=exits, exit_weights=weights)
        # As in SFTTrainer: clamped for a batch without labels, and num_items_in_batch counts all processes' tokens.
        items = output.tokens if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        loss = output.loss / items.to(output.loss.device).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        self._record(mode, exits, output, inputs)
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**{name: value for name, value in inputs.items() if name != "labels"})

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Trainer's; its loss is a mean of means by batch and process, and here the mean over all labelled tokens."""
        self._evaluated = (0.0, 0.0)
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
        )
        total, tokens = self._evaluated
        if tokens and output.metrics is not None:
            output.metrics[f"{metric_key_prefix}_loss"] = total / tokens
        return output

    def _without_repeated_rows(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch without labels in those rows with which accelerate fills up the last batch of several processes."""
        labels = inputs["labels"]
        kept = real_rows(self.accelerator, self.args.per_device_eval_batch_size, labels)
        if kept is None:
            return inputs
        return {**inputs, "labels": labels.masked_fill(~kept[:, None], -100)}

    def _exits_of(self, mode: str) -> tuple[list[int], list[float]]:
        """The exits of this pass and their weights, which sum to 1."""
        if mode == "eval" and self.args.eval_exits is not None:
            return self.eval_exits, [1 / len(self.eval_exits)] * len(self.eval_exits)
        others = self.args.exits_per_step if mode == "train" else None
        exits = draw_exits(self.exits, others, self.args.seed, self.state.global_step)
        weights = [self.exit_weights[k] for k in exits]
        return exits, [weight / sum(weights) for weight in weights]

    def _record(self, mode: str, exits: list[int], output: ExitOutput, inputs: dict[str, Any]) -> None:
        """Add this batch to the metrics that `SFTTrainer.log` averages."""
        assert output.nll is not None
        assert output.correct is not None
        assert output.tokens is not None
        mask = inputs.get("attention_mask")
        seen = torch.tensor(inputs["input_ids"].numel()) if mask is None else mask.sum()
        assert output.loss is not None
        counts = [output.loss.detach().float(), output.tokens, output.correct[-1], seen.to(output.nll.device)]
        # Not gather_for_metrics: it would take the last batch's sums for rows, and drop some
        sums = self.accelerator.gather(torch.stack([*output.nll, *counts])[None]).sum(0).tolist()
        *nll, loss, tokens, correct, seen = sums
        if mode == "eval":
            self._evaluated = (self._evaluated[0] + loss, self._evaluated[1] + tokens)
        for depth, value in zip(exits, nll, strict=True):
            self._add(mode, f"exit_{depth}_loss", value, tokens)
        if exits[-1] == self.decoder.depth:
            self._add(mode, "mean_token_accuracy", correct, tokens)
        if mode == "train":
            self._total_train_tokens += int(seen)
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def _add(self, mode: str, name: str, total: float, tokens: float) -> None:
        """Let the metric be the mean over all labelled tokens since the last log, however they are cut into batches."""
        metrics = self._metrics[mode]
        before = self._sums.get((mode, name), (0.0, 0.0)) if name in metrics else (0.0, 0.0)  # `log` has emptied it
        self._sums[mode, name] = sums = (before[0] + total, before[1] + tokens)
        if sums[1]:
            metrics[name] = [sums[0] / sums[1]]


def _soft_args(model: Any, args: TrainingArguments | None) -> SoFTConfig:
    """A `SoFTConfig` of any training arguments, as SFTTrainer makes its own."""
    if args is None:
        name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
        return SoFTConfig(f"{name.rstrip('/').split('/')[-1]}-SoFT")
    if isinstance(args, SoFTConfig):
        return args
    # to_dict() hides all that is called a token, such as SFTConfig's eos_token
    return SoFTConfig(**{field.name: getattr(args, field.name) for field in fields(args) if field.init})


def _add_exits(decoder: Decoder, outer: nn.Module) -> None:
    """Give the model's forward the arguments `exits` and `exit_weights`; without them it is what it was.

    `outer` is what is called in training: the model, or PEFT's around it, which calls its forward without hooks.
    """
    model = decoder.model
    before: Callable[..., Any] = model.forward

    # generate() and Trainer look at the signature. A deep copy of the model gets this method bound to the copy, while
    # `before`, TRL's, would run the original.
    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, exits: list[int] | None = None, **kwargs: Any) -> Any:
        original = self is model
        if exits is None:
            return before(*args, **kwargs) if original else type(self).forward(self, *args, **kwargs)
        if original:
            return _exit_forward(decoder, outer, args, kwargs, exits)
        return _exit_forward(find_decoder(self), self, args, kwargs, exits)

    model.forward = types.MethodType(forward, model)


def _exit_forward(
    decoder: Decoder, outer: nn.Module, args: tuple, kwargs: dict[str, Any], exits: list[int]
) -> ExitOutput:
    """One pass of the backbone and the losses of its exits, summed over the labelled tokens."""
    weights, labels = kwargs.pop("exit_weights"), kwargs.pop("labels")[:, 1:]
    for name in ("output_hidden_states", "output_attentions", "return_dict"):  # PEFT passes them on, as None
        kwargs.pop(name, None)
    keep = labels != IGNORED
    states: dict[int, torch.Tensor] = {}

    def take(depth: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            states[depth] = layer_state(output)[:, :-1][keep]

        return hook

    handles = [decoder.layers[k - 1].register_forward_hook(take(k)) for k in exits if k < decoder.depth]
    try:
        last = decoder.backbone(*args, use_cache=False, **kwargs).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
    hidden = [last[:, :-1][keep] if k == decoder.depth else decoder.finish(states[k]) for k in exits]
    head = decoder.head
    gather_with(outer, head.parameters(recurse=False))
    weight, bias = whole(head.weight), whole(head.bias)
    assert weight is not None
    losses = exit_losses(
        torch.stack([state.to(weight.device) for state in hidden]),
        labels[keep].to(weight.device),
        weight,
        bias,
        weights,
        decoder.logit_scale,
        decoder.softcap,
    )
    return ExitOutput(losses.loss, losses.nll, losses.correct, keep.sum().to(losses.nll.device))
