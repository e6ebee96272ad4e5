"""Two processes on CPUs as accelerate, FSDP2 and DeepSpeed take GPUs: importing this comes first.

Without an accelerator accelerate drops the plugins of FSDP and DeepSpeed. DeepSpeed would compile an operation for
shared memory, which gloo does without.
"""

import gc
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
if "quantised" not in sys.argv:
    sys.modules.setdefault("bitsandbytes", None)  # importing it takes seconds

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType

ENGINES = ("single", "ddp", "fsdp2", "zero1", "zero2", "zero3")


def use(engine: str) -> None:
    """Let this process be one of an engine's."""
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    if engine in ("fsdp2", "zero1", "zero2", "zero3"):
        PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    if engine == "fsdp2":
        os.environ["ACCELERATE_USE_FSDP"] = "true"
    if engine.startswith("zero"):
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # by name: it also imports torch


def deepspeed_config(stage: int, **settings: object) -> dict[str, object]:
    """A configuration in which Trainer fills in what it knows; every parameter is parted, however small."""
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping")
    given = {name: "auto" for name in auto}
    return {"zero_optimization": zero, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False} | (
        given | settings
    )


def arguments(engine: str, **settings: object) -> dict[str, object]:
    """Those of Trainer's that choose the engine, besides `settings`."""
    if engine in ("single", "ddp"):
        settings["use_cpu"] = True
    if engine == "fsdp2":
        settings["fsdp"] = True
        settings["fsdp_config"] = {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
            "reshard_after_forward": True,
        }
    if engine.startswith("zero"):
        settings["deepspeed"] = deepspeed_config(int(engine[-1]))
    return settings


def run_cells(out: str, cells: Mapping[str, Callable[[], dict[str, Any]]]) -> None:
    """Make the cells one after the other; the first process writes name -> what came out, or the error."""
    results: dict[str, Any] = {}
    gc.freeze()  # engines and trainers ask for many collections: with all that was imported each would take .7 s
    for name, make in cells.items():
        try:
            results[name] = make()
        except Exception:
            results[name] = {"error": traceback.format_exc()}
            print(name, traceback.format_exc(), file=sys.stderr, flush=True)  # of a process that writes nothing, too
        gc.collect()
        gc.freeze()  # what the first one imported
    if int(os.environ.get("RANK", 0)) == 0:
        torch.save(results, out)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
