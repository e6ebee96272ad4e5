"""SoFT and distillation in one process or in two under an engine; writes what came out.

python soft_script.py ENGINE OUT CASES...

Four steps of two micro-batches with two drawn exits, an evaluation whose last batch is filled up, saving, and a resume
from the second step.
"""

import gc
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from tests.distributed.gloo import arguments, run_cells, use

ENGINE, OUT, *CASES = sys.argv[1:]
use(ENGINE)

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_dynamic.trainers import SoFTConfig
from tests.trainers.kd.common import classifier
from tests.trainers.kd.common import rows as sentences
from tests.trainers.kd.common import trainer as classifying
from tests.trainers.kd.test_features import wide
from tests.trainers.kd.test_kd_sft import trainer as distilling
from tests.trainers.soft.common import rows, trainer
from tests.trainers.soft.families import build

PROCESSES = int(os.environ.get("WORLD_SIZE", 1))
OF_THE_CLOCK = ("runtime", "per_second", "total_flos", "epoch")


def lora(**settings: Any) -> dict[str, Any]:
    return {"peft_config": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **settings)}


# A full fine-tuning with a head that is the embedding, and with one of its own; adapters, one with a head.
KINDS: dict[str, dict[str, Any]] = {
    "tied": {"tie": True},
    "untied": {"tie": False},
    "lora": {"tie": False, **lora()},
    "lora-head": {"tie": False, **lora(modules_to_save=["lm_head"])},
    "loaded": {"tie": True, "loaded": True, **lora()},
    "exit-kd": {"tie": False, "exit_kd": "0:0.8 1:0.2", **lora()},
    "kd": {"tie": False, "teacher": "another", **lora()},
    "kd-ema": {"tie": False, "teacher": "ema", **lora()},
    "kd-classifier": {"tie": False, "teacher": "classifier"},
    "kd-rows": {
        "tie": False,
        "teacher": "classifier",
        "own": {
            "kd_weight": 0.5,
            "sample_weights": "meta",
            "meta_fraction": 0.25,
            "features": {"relations": 0.1, "hidden": 1.0},
            "layer_map": "uniform",
            "average_from": 0.5,
        },
    },
    "kd-noise": {"tie": False, "teacher": "classifier", "own": {"label_noise": "relabel", "noise_rate": 0.25}},
}


def model_for(tie: bool, loaded: bool) -> Any:
    model = build("llama")
    del model.model.layers[3:]
    model.config.num_hidden_layers = 3
    model.config.tie_word_embeddings = tie
    if tie:
        model.tie_weights()
    if not loaded:
        return model
    folder = f"{Path(OUT).with_suffix('')}-base"
    if int(os.environ.get("RANK", 0)) == 0:
        model.save_pretrained(folder)
    if dist.is_initialized():
        dist.barrier()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # in parts under ZeRO-3


def train(kind: str, resume: bool) -> dict[str, Any]:
    settings = dict(KINDS[kind])
    folder = Path(f"{Path(OUT).with_suffix('')}-{kind}")
    more = arguments(
        ENGINE,
        exits=[1, 2, 3],
        exits_per_step=1,
        max_steps=4,
        per_device_train_batch_size=2 // PROCESSES,
        per_device_eval_batch_size=4 // PROCESSES,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        learning_rate=1e-2,
        adam_epsilon=1e-2,  # as in tuners_script.py; SGD has no state, which torch cannot load under FSDP2
        max_grad_norm=0.5,
        use_cpu=ENGINE in ("single", "ddp"),
    )
    kept = None
    if settings.get("loaded"):  # zero.Init wants to know the engine when the model is loaded
        engine = {name: more[name] for name in ("deepspeed", "fsdp", "fsdp_config", "use_cpu") if name in more}
        kept = SoFTConfig(str(folder), bf16=False, **engine)
    model = model_for(settings.pop("tie"), settings.pop("loaded", False))
    teacher = settings.pop("teacher", None)
    if teacher is None:
        made: Any = trainer(folder, model, rows(16), rows(7), **more, **settings)
    else:
        for name in ("exits", "exits_per_step"):
            del more[name]
        more |= {"kd_weight": "0:0.9 1:0.3", "ema_decay": 0.5}
        if teacher == "classifier":
            # five rows: of the last batch one process has none
            labelled = [Dataset.from_list(sentences(count=count)) for count in (16, 5)]
            more |= dict(zip(("train_dataset", "eval_dataset"), labelled, strict=True))
            if "fsdp_config" in more:
                more["fsdp_config"]["transformer_layer_cls_to_wrap"] = ["BertLayer"]
            own = settings.get("own")
            if own is None:
                made = classifying(folder, classifier(1, 2), classifier(0), **more)
            else:  # in double precision, as weights of rows are made of small differences
                more |= {**own, "train_dataset": Dataset.from_list(sentences(count=24))}
                made = classifying(folder, wide().double(), classifier(0, 2).double(), **more)
        else:
            who = build("llama", seed=1) if teacher == "another" else teacher
            more["eval_dataset"] = Dataset.from_list(rows(7))
            made = distilling(folder, who, model, rows(16), **more, **settings)
    made.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
    out = folder / ("resumed" if resume else "whole")
    made.save_model(str(out))
    made.accelerator.wait_for_everyone()
    saved: dict[str, torch.Tensor] = {}
    for file in sorted(out.glob("*.safetensors")):
        saved |= load_file(file)
    logs = [
        {key: value for key, value in entry.items() if not key.endswith(OF_THE_CLOCK)}
        for entry in made.state.log_history
    ]
    found = {"saved": saved, "logs": logs, "type": made.accelerator.distributed_type.value}
    del kept
    made.accelerator.free_memory()  # DDP's reducer before the process group, see tests/tuners/distributed_script.py
    made.model_wrapped = made.model
    del made
    AcceleratorState._reset_state(reset_partial_state=False)
    gc.collect()
    return found


def both(kind: str) -> dict[str, Any]:
    return {"whole": train(kind, False), "resumed": train(kind, True)}


if __name__ == "__main__":
    run_cells(OUT, {kind: partial(both, kind) for kind in CASES})
