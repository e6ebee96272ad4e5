"""report.md: what a run did, found and left out."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from peft_dynamic.cli._job import Job
from peft_dynamic.cli._measure import Choice, HeldOut


@dataclass
class Findings:
    """What the stages of a run found, for the report."""

    dtype: torch.dtype
    notes: list[str] = field(default_factory=list)  # rows, columns and turns that were not used; what had no time
    steps: int = 0
    wanted_steps: int = 0
    pictures: bool = False
    held_out: HeldOut | None = None
    choice: Choice | None = None
    check: dict[str, Any] | None = None
    samples: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def agreement(check: dict[str, Any] | None) -> str:
    """What stock PEFT said, as a sentence."""
    if check is None:
        return "There was no time left to compare the logits with those that PEFT alone computes."
    how = (
        "bit for bit"
        if check["equal"]
        else f"to within {check['difference']:.2g}, their greatest being {check['scale']:.3g}"
    )
    return f"PEFT alone, in a second process, computes the same logits {how}; loss {check['loss']:.4f}."


def write_report(job: Job, found: Findings) -> None:
    """Write report.md."""
    assert found.held_out is not None
    assert found.choice is not None
    steps = (
        f"{found.steps} steps" if found.steps == found.wanted_steps else f"{found.steps} of {found.wanted_steps} steps"
    )
    config = job.config
    parts = [
        f"""# One training run, every rank

{job.model} on {job.data}: {len(job.examples)} examples, {steps} of {job.batch_size},
learning rate {job.learning_rate:g}, r = {config.r}, ranks {config.ranks}, lora_alpha {config.lora_alpha:g},
truncation {config.truncation}, rank sampling {config.rank_sampling}, scaling {config.scaling}, seed {job.seed},
{"4-bit base, " if job.four_bit else ""}{str(found.dtype).removeprefix("torch.")}, {platform.machine()}.
`run.yaml` has every setting, the versions and the data's hash. `sft.yaml` is the training for `peft-dynamic sft`.""",
        "## What was not used\n\n" + "\n".join(f"- {note}" for note in found.notes or ["Everything was used."]),
        f"## The rank curve\n\nOver {found.held_out.rows} of {len(job.held_out)} held-out examples: the loss per "
        "learnt token, its exponential, and the gain over the base model with its standard error over the rows.\n\n"
        + _table(found.held_out, found.choice),
    ]
    if found.pictures:
        parts.append("![rank curve](curve.png)")
    parts.append(found.choice.sentence)
    if found.choice.rank is not None:
        parts.append(f"It is in `lora/` as a stock LoRA adapter. {agreement(found.check)}")
    if found.samples:
        parts.append("## Samples\n\n" + "\n\n".join(_sample(*sample) for sample in found.samples))
    parts.append(_use(job.output, found.choice.rank or found.choice.best, found.choice.rank is not None))
    parts.append(f"Seconds: {', '.join(f'{name} {value:.0f}' for name, value in found.seconds.items())}.")
    (job.output / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _table(held_out: HeldOut, choice: Choice) -> str:
    lines = ["| rank | loss | perplexity | gain | of the best |", "|---|---:|---:|---:|---:|"]
    for row in held_out.curve().rows:
        values = f"{row.metrics['loss']:.4f} | {row.metrics['perplexity']:.4f}"
        if row.rank is None:
            lines.append(f"| base model | {values} | | |")
        else:
            label = f"**{row.rank}**" if row.rank == choice.rank else str(row.rank)
            lines.append(f"| {label} | {values} | {choice.described(row.rank)} | {choice.share(row.rank)} |")
    return "\n".join(lines)


def _sample(prompt: str, answers: dict[str, str]) -> str:
    said = "\n".join(f"[{who}] {answer}" for who, answer in answers.items())
    fence = "`" * max(3, 1 + max((len(run) for run in _ticks(prompt + said)), default=0))
    return f"{fence}text\n{prompt}\n\n{said}\n{fence}"


def _ticks(text: str) -> list[str]:
    import re

    return re.findall("`+", text)


def _use(output: Path, rank: int, exported: bool) -> str:
    text = f"""## Use it

At any rank:

```python
import peft_dynamic
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("{output / "adapter"}")
model.set_rank({rank})
```"""
    if not exported:
        return text
    return f"""{text}

The recommended rank, without peft_dynamic:

```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("{output / "lora"}")
```"""
