"""What trainers on TRL's SFTTrainer share whose loss is made of a decoder's states: SoFT's exits, and distillation."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftType
from torch import nn

from peft_dynamic._extras import how_to_install
from peft_dynamic.functional.kd_loss import Distillation
from peft_dynamic.functional.schedule import progress_of
from peft_dynamic.hosts.decoder import check_decoder, find_decoder
from peft_dynamic.hosts.deepspeed import gathering
from peft_dynamic.hosts.quantization import unpack_bnb_4bit
from peft_dynamic.hosts.repeated import real_rows
from peft_dynamic.trainers.soft.forward import ExitOutput, add_exits

try:
    from trl import SFTTrainer
except ImportError as error:
    raise ImportError(f"This trainer needs TRL. {how_to_install('trl', 'trl>=1.16', 'datasets')}") from error


class StatesTrainer(SFTTrainer):
    """SFTTrainer with the loss computed from the states of one or several exits, in the model's forward.

    Overrides `compute_loss`, and of `evaluation_loop` the loss, which is one mean over the labelled tokens of all
    batches and processes.
    """

    least_layers = 2  # of which one can be left early

    def begin(self) -> None:
        """After SFTTrainer's __init__: find the decoder and give its forward the losses."""
        self.decoder = find_decoder(self.model, self.least_layers)
        self._check_setting()
        unpack_bnb_4bit(self.model)
        with gathering(self.model):
            check_decoder(self.decoder)
        # Of a forward without **kwargs Trainer thinks that it cannot divide by the tokens of a whole step; ours does.
        self.model_accepts_loss_kwargs = True
        self._sums: dict[tuple[str, str], tuple[float, float]] = {}  # (mode, metric): its sum and its tokens
        self._evaluated = (0.0, 0.0)  # the same of the loss of this evaluation
        add_exits(self.decoder, self.model)

    @property
    def progress(self) -> float:
        """Steps done over all steps; 1 outside a training, where schedules are at their end."""
        return progress_of(self.state.global_step, self.state.max_steps)

    def exits_of(self, mode: str) -> tuple[list[int], list[float]]:
        """The exits of this pass, increasing, and their weights."""
        raise NotImplementedError

    def distillation(self, mode: str, inputs: dict[str, Any]) -> Distillation | None:
        """Who teaches in this pass; None for the labels alone."""
        raise NotImplementedError

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

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        mode = "train" if self.model.training else "eval"
        exits, weights = self.exits_of(mode)
        if mode == "eval":
            inputs = self._without_repeated_rows(inputs)
        how = self.distillation(mode, inputs)
        taught = {} if how is None else {"distillation": how}
        output = model(**inputs, exits=exits, exit_weights=weights, **taught)
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
        taught = [] if output.kd is None or output.agree is None else [*output.kd, *output.agree]
        sums = self.accelerator.gather(torch.stack([*output.nll, *taught, *counts])[None]).sum(0).tolist()
        *each, loss, tokens, correct, seen = sums
        nll, *more = (each[i : i + len(exits)] for i in range(0, len(each), len(exits)))
        if mode == "eval":
            self._evaluated = (self._evaluated[0] + loss, self._evaluated[1] + tokens)
        self._record_losses(mode, exits, nll, more, tokens)
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

    def _record_losses(
        self, mode: str, exits: list[int], nll: list[float], more: list[list[float]], tokens: float
    ) -> None:
        """Add the exits' losses, and what a teacher says of them, to the metrics."""
        for depth, value in zip(exits, nll, strict=True):
            self._add(mode, f"exit_{depth}_loss", value, tokens)
        for name, values in zip(("kd", "agreement"), more, strict=False):
            for depth, value in zip(exits, values, strict=True):
                if depth < exits[-1]:
                    self._add(mode, f"exit_{depth}_{name}", value, tokens)
