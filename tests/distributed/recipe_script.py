"""The command, as `accelerate launch -m peft_dynamic.cli` runs it, on CPUs."""

import importlib
import os
import sys

from tests.distributed.gloo import PartialState  # which makes accelerate take the engines on CPUs

if os.environ.get("ACCELERATE_USE_FSDP") or os.environ.get("ACCELERATE_USE_DEEPSPEED"):
    from accelerate.utils import DistributedType

    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
if os.environ.get("ACCELERATE_USE_DEEPSPEED"):
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None

import torch.distributed as dist

from peft_dynamic.cli import main

try:
    main()
except SystemExit as ended:
    if ended.code:
        raise
if dist.is_initialized():
    dist.barrier()
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)  # all is written; gloo's threads may end an interpreter that goes down by the book
