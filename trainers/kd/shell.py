"""What the two trainers of distillation share, beside the loss: what they refuse, log, save and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from peft_dynamic.functional.schedule import progress_of
from peft_dynamic.hosts.deepspeed import is_parted
from peft_dynamic.trainers.kd.average import Average
from peft_dynamic.trainers.kd.report import Sums
from peft_dynamic.trainers.kd.teachers import MeanTeacher, Teacher

STATE = "kd_teacher.safetensors"
AVERAGE = "kd_average.safetensors"


class DistillingTrainer(Trainer):
    """`transformers.Trainer` beside a trainer that is made of it, whose methods come between the two."""

    distiller: Any

    def check_setting(self) -> None:
        """Raise for what no teacher can be combined with, as far as the distiller has not."""
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs in one process: nn.DataParallel splits the batch without the teacher. Start a "
                "process per GPU (accelerate launch), or set CUDA_VISIBLE_DEVICES=0."
            )
        if isinstance(self.distiller.teacher, MeanTeacher) and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                "teacher='ema' keeps a mean of whole weights, which FSDP and DeepSpeed part or copy: use DDP or one "
                "process, or another teacher."
            )
        if any(map(is_parted, self.model.parameters())):
            raise ValueError(
                "ZeRO-3 parts the weights between a teacher's pass and the student's; use ZeRO-2 or FSDP2."
            )
        if self.args.average_from is not None and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                "average_from keeps a mean of whole weights, which FSDP and DeepSpeed part or copy: use DDP or one "
                "process, or leave it out."
            )
        by_row = self.distiller.meta is not None or self.distiller.noise is not None
        if self.distiller.features is not None and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                "features train matrices of their own and look into the layers, which was not tried under FSDP and "
                "DeepSpeed: use DDP or one process, or leave them out."
            )
        if by_row and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                "sample_weights and label_noise have passes of their own in each process, in which FSDP and DeepSpeed "
                "do not gather the weights: use DDP or one process, or leave them out."
            )
        parallel = self.accelerator.parallelism_config
        if parallel is not None and (parallel.sp_enabled or parallel.cp_enabled or parallel.tp_enabled):
            raise ValueError(
                f"parallelism_config={parallel}: sequence, context and tensor parallelism split the rows that are "
                "compared; use DDP or FSDP2."
            )

    def start(self) -> None:
        """After Trainer's __init__ and the distiller's."""
        self.check_setting()
        self.sums = {True: Sums(), False: Sums()}  # by whether the model is in training
        self.used: dict[str, float] = {}  # the schedules' values in the last step
        # Of a forward without **kwargs Trainer thinks that it cannot divide by the rows of a whole step; ours does.
        self.model_accepts_loss_kwargs = True
        self.average = None if self.args.average_from is None else Average(self.distiller.student)
        self.add_callback(_TellTeacher(self.distiller))
        if self.average is not None:
            self.add_callback(_Averaging(self.average, self.args.average_from))

    @property
    def progress(self) -> float:
        """Steps done over all steps; 1 outside a training, where schedules are at their end."""
        return progress_of(self.state.global_step, self.state.max_steps)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, with what `features` train."""
        made = super().create_optimizer(*args, **kwargs)
        more, groups = self.distiller.parameters(), self.optimizer.param_groups
        if more and not any(p is more[0] for group in groups for p in group["params"]):
            self.optimizer.add_param_group({"params": more, "weight_decay": self.args.weight_decay})
        return made

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's, with what the distillation has to tell."""
        if "loss" in logs:
            logs = {**logs, **self.sums[True].take(), **self.used}
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Trainer's, with the teacher's score beside the student's."""
        self.sums[False].take()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self.sums[False].take()
        if output.metrics is not None:
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
            if "ce" in means:  # Trainer's is a mean of means by batch and process
                output.metrics[f"{metric_key_prefix}_loss"] = means["ce"]
        return output

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        states = {STATE: self.distiller.state(), AVERAGE: {} if self.average is None else self.average.state()}
        folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        for name, state in states.items():
            if state and self.is_world_process_zero():
                save_file({key: value.contiguous().cpu() for key, value in state.items()}, folder / name)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        path = Path(resume_from_checkpoint, STATE)
        if self.distiller.state():
            if not path.exists():
                raise ValueError(
                    f"resume_from_checkpoint={resume_from_checkpoint!r} has no {STATE}: it was trained without this "
                    "teacher or these features, which have a state of their own. Start anew, or with those of before."
                )
            self.distiller.load_state(load_file(path))
        if self.average is not None:
            path = Path(resume_from_checkpoint, AVERAGE)
            if not path.exists():
                raise ValueError(
                    f"resume_from_checkpoint={resume_from_checkpoint!r} has no {AVERAGE}: it was trained without "
                    "average_from. Leave it out, or start anew."
                )
            self.average.load_state(load_file(path))


class _TellTeacher(TrainerCallback):
    def __init__(self, distiller: Any) -> None:
        self.distiller = distiller

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.distiller.noise is not None:
            self.distiller.noise.bound = None  # the training rows may be others than in the training before
        if isinstance(self.distiller.teacher, Teacher):
            self.distiller.teacher.state()  # a running mean begins before the first step, whatever its weight is

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.distiller.begun()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.distiller.updated()


class _Averaging(TrainerCallback):
    def __init__(self, average: Average, start: float) -> None:
        self.average, self.start = average, start

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:  # a training that goes on has loaded its mean
            self.average.empty()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if progress_of(state.global_step, state.max_steps) >= self.start:
            self.average.add()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.average.put()


def scaled(trainer: Any, loss: torch.Tensor, items: Any) -> torch.Tensor:
    """A sum over the rows of all processes, as Trainer scales it: DDP takes the mean of the processes' gradients."""
    if trainer.args.average_tokens_across_devices and items is not None:
        return loss * trainer.accelerator.num_processes
    return loss
