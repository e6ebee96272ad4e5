"""Whether the first pass of the updates gives the old log-probabilities too, so that they need no pass of their own.

Before the first optimizer step of a rollout the policy is the one that sampled. Where the whole rollout is one
micro-batch, that step's own forward pass has the log-probabilities and values from which the advantages are made.

Notable: this holds only if the policy computes the same in training as in evaluation. Two checks have to say yes. The
first lets in known classes alone, since a DyLoRA draws another rank for its step. The second is a trial: it looks for
whatever else is random in training.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from peft_dynamic.hosts.deepspeed import at_hand, gathering
from peft_dynamic.hosts.modes import evaluating
from peft_dynamic.trainers.ppo.config import PPOConfig
from peft_dynamic.trainers.ppo.reference import is_peft
from peft_dynamic.trainers.ppo.scoring import Scorer, Sequences


def shares_first_pass(model: Any, scorer: Scorer, args: PPOConfig) -> bool:
    """Whether a rollout is one micro-batch, and the policy scores it in training as it does in evaluation."""
    if args.num_mini_batches * args.gradient_accumulation_steps > 1:
        return False
    if not args.disable_dropout or args.neftune_noise_alpha is not None:
        return False
    return (not is_peft(model) or _is_stock_lora(model)) and _trains_as_it_scores(model, scorer)


def _is_stock_lora(model: Any) -> bool:
    """Plain LoRA of PEFT's own, with no variant such as DoRA, and nothing else."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if model.active_peft_config.is_prompt_learning or not layers:
        return False
    return all(
        isinstance(layer, LoraLayer) and type(layer).__module__.startswith("peft.") and not layer.lora_variant
        for layer in layers
    )


def _trains_as_it_scores(model: Any, scorer: Scorer) -> bool:
    """Tried on a few tokens, with the random state put back."""
    device = model.get_input_embeddings().weight.device
    ids = torch.arange(8, device=device)[None] % model.get_input_embeddings().num_embeddings
    few = Sequences(ids, torch.tensor([1], device=device), torch.tensor([7], device=device))
    found, head = [], scorer.head.parameters(recurse=False)
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        evaluating(model),
        at_hand(head),
        gathering(model),
    ):
        for training in (False, True):
            model.train(training)
            logprobs, values = scorer(model, few, 7)
            assert values is not None
            found.append(torch.cat([logprobs, values], dim=1))
    return torch.equal(*found)
