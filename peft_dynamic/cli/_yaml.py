"""sft.yaml and the rows beside it: the run of `train`, as `peft-dynamic sft --config` and TRL's scripts take it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from peft_dynamic.cli._identity import ADAPTER_FIELDS
from peft_dynamic.cli._job import Job

NAME, ROWS = "sft.yaml", "rows.jsonl"
HEAD = """# The training of this run, by TRL's names: change what you like, then
#     peft-dynamic sft --config {file}
# {rows} has the rows as tokens, those that are learnt among the labels.
"""


def write_recipe(job: Job, rows: Sequence[Mapping[str, list[int]]], steps: int, dtype: str, use_cpu: bool) -> Path:
    """Write both files.

    Args:
        job: the run.
        rows: what it trains on, as tokens.
        steps: how many it plans.
        dtype: the base model's.
        use_cpu: whether it trains on the CPU.

    Returns:
        The path of sft.yaml.
    """
    folder = job.output
    lines = (json.dumps({name: row[name] for name in ("input_ids", "labels")}) for row in rows)
    (folder / ROWS).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    config = job.config.to_dict()
    adapter = {
        name: _plain(config[name]) for name in ADAPTER_FIELDS if name != "peft_type" and config[name] is not None
    }
    quantised = {"load_in_4bit": True, "use_bnb_nested_quant": True} if job.four_bit else {}
    settings = {
        "model_name_or_path": job.model,
        "dataset_name": str(folder / ROWS),
        "output_dir": str(folder / "sft"),
        "adapter": str(getattr(config["peft_type"], "value", config["peft_type"])).lower(),
        **adapter,
        **quantised,
        "dtype": dtype,
        "bf16": dtype == "bfloat16",
        "use_cpu": use_cpu,
        "max_steps": steps,
        "per_device_train_batch_size": job.batch_size,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, steps // 20),
        "max_length": None,
        "gradient_checkpointing": False,
        "seed": job.seed,
        "logging_steps": max(1, steps // 10),
    }
    text = HEAD.format(file=folder / NAME, rows=ROWS) + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    (folder / NAME).write_text(text, encoding="utf-8")
    return folder / NAME


def _plain(value: Any) -> Any:
    """Without sets, and without PEFT's and our own kinds of text."""
    value = sorted(value) if isinstance(value, set) else getattr(value, "value", value)
    return json.loads(json.dumps(value))
