"""PPOTrainer: see its docstring, and docs/ppo.md.

What is overridden of transformers.Trainer:

- `train` and `_get_train_sampler`: prompts repeated per rollout;
- `_prepare_inputs`: a raw batch of prompts becomes a micro-batch of a rollout;
- `compute_loss`;
- `evaluation_loop`: rewards of completions;
- `log`: adds what was measured;
- the saving and loading of the value function and the rollout beside the model.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, Trainer, set_seed
from transformers.trainer_utils import EvalLoopOutput

from peft_dynamic.functional import ppo
from peft_dynamic.hosts.quantization import unpack_bnb_4bit
from peft_dynamic.trainers.ppo.config import PPOConfig
from peft_dynamic.trainers.ppo.metrics import CompletionTable, Metrics, length_metrics, reward_metrics
from peft_dynamic.trainers.ppo.reference import check_reference, frozen_copy, is_peft
from peft_dynamic.trainers.ppo.rewards import RewardFunction, Rewards
from peft_dynamic.trainers.ppo.rollout import Begun, Rollouts
from peft_dynamic.trainers.ppo.rollout_func import RolloutFunction
from peft_dynamic.trainers.ppo.sampler import RolloutSampler
from peft_dynamic.trainers.ppo.scoring import Scorer, Sequences
from peft_dynamic.trainers.ppo.setup import (
    as_dict,
    check_arguments,
    check_dataset,
    disable_dropout,
    hidden_width,
    load_model,
    make_generator,
    seed_of,
)
from peft_dynamic.trainers.ppo.sharding import GradientArrival, check_engine, is_sharded, watch
from peft_dynamic.trainers.ppo.sharing import shares_first_pass
from peft_dynamic.trainers.ppo.value_head import FILE, NAME, ValueFunction


class PPOTrainer(Trainer):
    """Trains a causal language model by proximal policy optimization, with reward functions.

    A rollout samples a completion for each of some prompts and asks the reward functions for their scores. The value
    function, a linear head on the policy's last hidden state, turns them into advantages per token. The policy is then
    trained on the rollout for `num_ppo_epochs` passes, clipped, with a KL penalty towards the reference policy. The
    equations are those of `peft_dynamic.functional.ppo`.

    Everything else is transformers.Trainer: callbacks, logging, checkpoints, resuming, several processes.

        settings = PPOConfig("out", max_steps=1, bf16=torch.cuda.is_available())
        PPOTrainer("my/model", my_reward, settings, train_dataset=prompts, peft_config=lora).train()

    Args:
        model: a causal language model, its name or path (of a model or an adapter), or a PeftModel whose active
            adapter is trained.
        reward_funcs: one or a list of: functions, async functions, sequence-classification models with one label, or
            names of such. A function is called as TRL's GRPOTrainer calls it, with `prompts`, `completions`,
            `completion_ids`, every other column of the dataset, `trainer_state`, `log_extra` and `log_metric`, all by
            name, and returns a number per completion, or None where it does not apply.
        args: the settings.
        train_dataset: rows with a `prompt`, text or a conversation, and any other columns.
        eval_dataset: the same; or a dict of such.
        processing_class: the tokenizer; None to load the model's.
        reward_processing_classes: tokenizers of reward models; None to load theirs.
        callbacks: as in Trainer.
        optimizers: as in Trainer.
        peft_config: an adapter to put on the model.
        ref_model: the reference policy. Without it the reference is the model without its adapter or, where there is
            no adapter, a frozen copy of it.
        value_model: a sequence-classification model with one label for the values, instead of the linear head.
        rollout_func: generates in place of the policy's own `generate`, such as with vLLM. It is called as TRL's
            GRPOTrainer calls it, `rollout_func(prompts, trainer)`, and returns a dict: `prompt_ids` and
            `completion_ids`, a list of token ids for each prompt; `logprobs`, a list of numbers for each completion or
            None; and further fields for the reward functions. `trainer.do_sample` says whether to sample.

    Raises:
        ValueError: the model, the data and the settings do not fit together; the text says what to change.
        TypeError: an argument is of the wrong kind.
    """

    _signature_columns: list[str] | None
    control: Any
    loss_is_scaled_for_ga = True  # each micro-batch is divided by the tokens of the whole optimizer step
    _tag_names = ("ppo", "peft-dynamic")
    num_generations = num_generations_eval = 1  # completions for each prompt that a `rollout_func` is given
    _values_to_save: dict[str, torch.Tensor] | None = None
    do_sample = True  # or False while a greedy evaluation asks a `rollout_func`

    def __init__(
        self,
        model: Any,
        reward_funcs: RewardFunction | Sequence[RewardFunction],
        args: PPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: Any = None,
        optimizers: Any = (None, None),
        peft_config: Any = None,
        ref_model: Any = None,
        value_model: Any = None,
        rollout_func: RolloutFunction | None = None,
    ) -> None:
        args = PPOConfig("ppo_output") if args is None else args
        check_arguments(model, args, peft_config)
        if rollout_func is not None and not callable(rollout_func):
            raise TypeError(f"rollout_func={rollout_func!r} must be a function of prompts and trainer, or None.")
        self.rollout_func = rollout_func
        for dataset in (train_dataset, *(eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset])):
            check_dataset(dataset)
        set_seed(args.seed)  # an adapter starts at random
        folder = model if isinstance(model, str) else None
        model = load_model(model, args) if isinstance(model, str) else model
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(model.config._name_or_path)
        self.rewards = Rewards(
            reward_funcs, args.reward_weights, reward_processing_classes, as_dict(args.model_init_kwargs)
        )
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError("The model has no parameter that is trained. Load a PeftModel with is_trainable=True.")
        self.policy = model.get_base_model() if is_peft(model) else model
        if self.policy.config.is_encoder_decoder:
            raise ValueError(f"{type(self.policy).__name__} is an encoder-decoder; PPOTrainer trains decoders.")
        unpack_bnb_4bit(model)
        if args.disable_dropout:
            disable_dropout(model)

        self.ref_model, self.ref_adapter = ref_model, args.ref_adapter_name
        if args.kl_coef and ref_model is None:
            if is_peft(model):
                check_reference(model, args.ref_adapter_name)
            else:
                self.ref_model = frozen_copy(model)
        self._attach_value(value_model, folder)
        self.generator = make_generator(model, self.policy, processing_class, args)
        if is_peft(model) and args.gradient_checkpointing:
            model.enable_input_require_grads()

        self.kl_coef = args.kl_coef
        self.rollouts = Rollouts(self)
        self._rollout: dict[str, Any] | None = None
        self._begun: Begun | None = None  # a rollout that waits for its first pass
        self._stopped = False  # whether the rollout's remaining steps are skipped, by target_kl
        self._micro_step = 0  # forward and backward passes since training started
        self._gradients_seen = False  # whether it was looked for them
        self._arrival: GradientArrival | None = None
        self.metrics = Metrics()
        self.table = CompletionTable()
        super().__init__(
            model=model,
            args=args,
            data_collator=list,  # reward functions want the rows as they are
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs in one process would run under nn.DataParallel, which PPOTrainer does not "
                "support. Use `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one of them."
            )
        check_engine(self, value_model)
        watch(self)
        self.scorer = Scorer(self.policy, args.temperature)
        self.ref_scorer = None
        if self.ref_model is not None:
            self.ref_model = self.accelerator.prepare_model(self.ref_model, evaluation_mode=True)
            unpack_bnb_4bit(self.ref_model)
            base = self.ref_model.get_base_model() if is_peft(self.ref_model) else self.ref_model
            self.ref_scorer = Scorer(base, args.temperature)
        self.shares_first_pass = shares_first_pass(self.model, self.scorer, args)
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(list(self._tag_names))

    def _attach_value(self, value_model: Any, folder: str | None) -> None:
        """Hang the value function below the policy; one that is there, or in the model's folder, goes on."""
        device = self.policy.get_input_embeddings().weight.device
        if value_model is not None or not isinstance(getattr(self.policy, NAME, None), ValueFunction):
            function = ValueFunction(hidden_width(self.policy), device, value_model)
            self.policy.add_module(NAME, function)
            if folder is not None and (Path(folder) / FILE).is_file():
                function.load(folder)

    @property
    def value_function(self) -> ValueFunction:
        """The value function: a linear head on the policy's hidden states, or a model of its own."""
        return getattr(self.policy, NAME)

    # Prompts

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = ["prompt"]

    def get_train_dataloader(self) -> Any:
        check_dataset(self.train_dataset)
        if self.train_dataset is None:
            raise ValueError("train_dataset is None: training needs rows with a `prompt`.")
        return self._get_dataloader(
            dataset=self.train_dataset,
            description="Training",
            batch_size=self.args.rollout_size,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> RolloutSampler:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return RolloutSampler(
            len(self.train_dataset if train_dataset is None else train_dataset),
            self.args.rollout_size * self.args.world_size,
            self.args.steps_per_rollout,
            seed if self.args.shuffle_dataset else None,
            lambda: int(self.state.epoch or 0),
        )

    # The update

    def _prepare_inputs(self, inputs: Any) -> dict[str, Any]:
        """The next micro-batch; the prompts in `inputs` are rolled out where a rollout begins, and else are known."""
        args = self.args
        index, step = divmod(self._micro_step, args.steps_per_rollout)
        if step == 0:
            self._rollout, self._begun, self._stopped = None, None, False
            if self.shares_first_pass:
                self._begun = self.rollouts.begin(inputs, index)
            else:
                self._rollout = self.rollouts.make(inputs, index)
        per_epoch = args.num_mini_batches * args.gradient_accumulation_steps
        epoch, step = divmod(step, per_epoch)
        # The order is a function of the numbers, so that a resumed run has it without its being saved
        seeds = (args.seed, index, args.process_index, epoch)
        order = torch.randperm(args.rollout_size, generator=torch.Generator().manual_seed(seed_of(*seeds)))
        size, per_step = args.train_batch_size, args.train_batch_size * args.gradient_accumulation_steps
        known = self._rollout if self._begun is None else self._begun.done.tensors()
        assert known is not None
        first = step * size // per_step * per_step
        rows = order[first : first + per_step].to(args.device)
        if args.gradient_accumulation_steps > 1:  # rows of like lengths together: the same sum over less padding
            rows = rows[torch.argsort((known["prompt_lengths"] + known["lengths"])[rows], stable=True)]
        chosen = rows[step * size - first :][:size]
        batch = {key: value[chosen] for key, value in known.items()}
        # Tokens of this optimizer step on all processes, per process: DDP averages the gradients over these.
        tokens = known["lengths"][rows].sum()
        batch["rows"] = chosen
        batch["tokens"] = self.rollouts.total(tokens.float()) / args.world_size
        self._micro_step += 1
        return batch

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The clipped losses of policy and value, summed over the micro-batch, per token of the optimizer step."""
        if return_outputs:
            raise ValueError("return_outputs=True is not supported by PPOTrainer.")
        args = self.args
        lengths = inputs["lengths"]
        width = int(lengths.max())
        batch = Sequences(inputs["ids"], inputs["prompt_lengths"], lengths)
        with self.accelerator.autocast():
            logprobs, values = self.scorer(model, batch, width)
        assert values is not None
        mask = ppo.position_mask(lengths, width)
        if self._begun is not None:
            inputs = inputs | self._finish(inputs["rows"], logprobs.detach(), values.detach())
        old = {key: inputs[key][:, :width] for key in ("logprobs", "values", "advantages", "returns")}
        policy, policy_clipped = ppo.policy_loss(logprobs, old["logprobs"], old["advantages"], args.cliprange)
        value, value_clipped = ppo.value_loss(values[:, :-1], old["values"], old["returns"], args.cliprange_value)
        policy, value = (policy * mask).sum() / inputs["tokens"], (value * mask).sum() / inputs["tokens"]
        change = ((logprobs.detach() - old["logprobs"]) ** 2 * mask).sum()
        sums = [policy_clipped.logical_and(mask).sum(), value_clipped.logical_and(mask).sum(), 0.5 * change]
        self.metrics.add_micro_batch(
            torch.stack([policy.detach(), value.detach(), *(part / inputs["tokens"] for part in sums)]),
        )
        return policy + args.vf_coef * value

    def _finish(self, rows: torch.Tensor, logprobs: torch.Tensor, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Complete the rollout with what the first pass over it has given, and return its rows in the pass's order."""
        assert self._begun is not None
        begun, place = self._begun, torch.argsort(rows)
        self._rollout = self.rollouts.finish(begun, logprobs[place], values[place])
        self._begun = None
        return {key: value[rows] for key, value in self._rollout.items()}

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        if self._stopped and self._micro_step % self.args.steps_per_rollout:
            self._micro_step += 1
            self.metrics.skip_step(self._micro_step % self.args.gradient_accumulation_steps == 0)
            return torch.zeros((), device=self.args.device)  # and no gradient: the optimizer leaves all as it is
        if not self._gradients_seen:
            self._gradients_seen = True
            own = {id(p) for p in self.value_function.parameters()}
            self._arrival = GradientArrival(
                [p for p in self.model.parameters() if p.requires_grad and id(p) not in own]
            )
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._micro_step % self.args.gradient_accumulation_steps == 0:
            change = self.metrics.end_step()
            if self.args.target_kl is not None:
                mean = float(self.rollouts.total(change)) / self.args.world_size
                self._stopped = mean > self.args.target_kl
        if self._arrival is not None:
            arrival, self._arrival = self._arrival, None
            if not arrival.check():
                raise RuntimeError(
                    f"None of the policy's {len(arrival.parameters)} trained parameters has a gradient after a "
                    "backward pass, so training would change nothing. Is the adapter active, and can its layers be "
                    "differentiated?"
                )
        self._check_finite(loss)
        return loss

    def _check_finite(self, loss: torch.Tensor) -> None:
        """Stop before an update that would turn the weights into NaN, and a checkpoint that would keep them."""
        # A scaler skips such steps by itself; DeepSpeed has stepped already, and FiniteSteps was asked before
        if self.accelerator.scaler is not None or self.is_deepspeed_enabled:
            return
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        parts = [gradient.to_local() if hasattr(gradient, "to_local") else gradient for gradient in gradients]
        finite = torch.stack([loss.isfinite().all(), *(part.isfinite().all().to(loss.device) for part in parts)]).all()
        if is_sharded(self):  # each process has another part
            finite = self.rollouts.total((~finite).float()) == 0
        if not finite:  # the device is waited for once
            raise self.not_finite(loss)

    def not_finite(self, loss: torch.Tensor | None) -> FloatingPointError:
        """The error for a step that is not to be taken."""
        step = self.state.global_step + 1
        of_loss = "" if loss is None else f"The loss of step {step} is {loss.item():g}, or a gradient of it"
        return FloatingPointError(
            f"{of_loss or f'A gradient of step {step}'} is not finite. Nothing was updated, and checkpoints that are "
            "saved stay as they are. Lower learning_rate, set max_grad_norm, or look at the rewards' size (reward and "
            "reward_std in the logs)."
        )

    # Evaluation and logs

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Rewards and lengths of a completion for each prompt, greedy unless `eval_do_sample`."""
        found, kept, number = [], self.table, 0
        self.table = CompletionTable()
        self.callback_handler.eval_dataloader = dataloader
        for number, rows in enumerate(dataloader):
            done = self.rollouts.complete(
                [row["prompt"] for row in rows],
                self.args.eval_do_sample,
                (self.args.seed, -1 - number, self.args.process_index),
            )
            rewards = self.rollouts.judge(rows, done, "eval")
            columns = [self.rewards.total(rewards), done.lengths.float(), done.ended.float()]
            found.append(self.accelerator.gather_for_metrics(torch.cat([rewards, torch.stack(columns, 1)], dim=1)))
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        self.table = kept
        everything = torch.cat(found)
        scores, lengths, ended = everything[:, -3:].T
        metrics = reward_metrics(self.rewards.names, everything[:, :-3], scores) | length_metrics(lengths, ended)
        metrics |= self.metrics.take("eval")
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in metrics.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(everything))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs or "train_loss" in logs:
            logs = logs | self.metrics.take("train", self.rollouts.total, self.args.world_size)
            if self.args.log_completions and self.is_world_process_zero():
                self.table.show(self.args.num_completions_to_print, self.state.global_step)
                self.table.write(self.args.output_dir, self.state.global_step)
            self.table.clear()
        super().log(logs, start_time)

    # Checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        self._begun, self._rollout, self._micro_step, self.kl_coef = None, None, 0, self.args.kl_coef
        self._gradients_seen, self._arrival, self._stopped = False, None, False
        self.metrics, self.table = Metrics(), CompletionTable()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if state_dict is not None:  # ZeRO-3 gathers the value function with the policy
            state_dict = {name: value for name, value in state_dict.items() if NAME not in name.split(".")}
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.value_function.save(output_dir or self.args.output_dir, self._values_to_save)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        # `_save` is for one process, and every one has to take part where the value function is in parts
        self._values_to_save = self.value_function.tensors() if is_sharded(self) else None
        super().save_model(output_dir, _internal_call)

    def _state_file(self, folder: str) -> str:
        return os.path.join(folder, f"ppo_state_{self.args.process_index}.pt")

    def _save_rng_state(self, output_dir: str) -> None:
        """Beside the random state, what each process needs to go on in the middle of a rollout."""
        super()._save_rng_state(output_dir)
        rollout = None
        if self._micro_step % self.args.steps_per_rollout:
            rollout = {key: value.cpu() for key, value in (self._rollout or {}).items()}
        state = {
            "micro_step": self._micro_step,
            "kl_coef": self.kl_coef,
            "stopped": self._stopped,
            "rollout": rollout,
            "shape": [self.args.rollout_size, self.args.steps_per_rollout, self.args.world_size],
        }
        torch.save(state, self._state_file(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._go_on_from(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.is_deepspeed_enabled:  # whose engine loads the model by itself
            self._go_on_from(checkpoint)

    def _go_on_from(self, resume_from_checkpoint: str) -> None:
        """Take over the value function, and the rollout that was being trained on."""
        self.value_function.load(resume_from_checkpoint)
        path = self._state_file(resume_from_checkpoint)
        if not os.path.isfile(path):
            raise ValueError(
                f"{resume_from_checkpoint} has no {os.path.basename(path)}: it was saved with save_only_model=True or "
                "by fewer processes. Resume with the number of processes it was saved by, or start anew from its model."
            )
        state = torch.load(path, weights_only=True)
        shape = [self.args.rollout_size, self.args.steps_per_rollout, self.args.world_size]
        if state["shape"] != shape:
            raise ValueError(
                f"{resume_from_checkpoint} was saved with {state['shape']} completions per rollout, passes per rollout "
                f"and processes, and this run has {shape}. Resume with the batch sizes it was saved with."
            )
        self._micro_step, self.kl_coef = state["micro_step"], state["kl_coef"]
        self._stopped = state.get("stopped", False)  # which older checkpoints do not have
        if state["rollout"] is not None:
            self._rollout = {key: value.to(self.args.device) for key, value in state["rollout"].items()}

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.value_function.load(self.state.best_model_checkpoint)
