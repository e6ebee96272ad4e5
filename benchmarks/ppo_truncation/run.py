"""What a completion that was cut off is worth to PPO: its score, or the value of what would have come next.

    PYTHONPATH=. python benchmarks/ppo_truncation/run.py

The tests' tiny policy (17 tokens, one of them EOS) is paid the share of the letter b in what it wrote, at most 1, and
trained for 80 optimizer steps with `bootstrap_truncated` off and on, all parameters or a LoRA, five seeds each. With
at most 5 tokens nearly all completions are cut off; with at most 60 most end by themselves. No model is downloaded.
"""

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import PrinterCallback

from tests.trainers.ppo.common import LETTERS, tiny_policy, trainer

SEEDS, STEPS, LAST = range(5), 80, 10


def share(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [ids.count(LETTERS.index("b")) / len(ids) for ids in completion_ids]


def run(bootstraps: bool, lora: bool, longest: int, seed: int) -> dict[str, Any]:
    settings: dict[str, Any] = {"bootstrap_truncated": bootstraps, "max_completion_length": longest, "seed": seed}
    settings |= {"per_device_train_batch_size": 16, "lr_scheduler_type": "constant"}
    if lora:
        settings["peft_config"] = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        made = trainer(Path(folder), tiny_policy(seed=seed), share, max_steps=STEPS, num_ppo_epochs=2, **settings)
        made.remove_callback(PrinterCallback)
        made.train()
    logs = [log for log in made.state.log_history if "reward" in log]

    def mean(name: str, some: list[dict[str, Any]]) -> float:
        return statistics.mean(log[name] for log in some)

    return {
        "bootstrap_truncated": bootstraps,
        "lora": lora,
        "max_completion_length": longest,
        "seed": seed,
        "reward": mean("reward", logs[-LAST:]),
        "value": mean("value/mean", logs[-LAST:]),
        "ended_at_first": mean("completions/ended_ratio", logs[:LAST]),
        "ended": mean("completions/ended_ratio", logs[-LAST:]),
    }


def main() -> None:
    torch.set_num_threads(1)
    runs = []
    print("| longest | trained | cut off is worth | ended, first and last | reward | value |\n" + "|---" * 6 + "|")
    for longest in (5, 60):
        for lora in (False, True):
            for bootstraps in (False, True):
                found = [run(bootstraps, lora, longest, seed) for seed in SEEDS]
                runs += found
                mean = {name: statistics.mean(one[name] for one in found) for name in found[0]}
                rewards = " ".join(f"{one['reward']:.2f}" for one in found)
                print(
                    f"| {longest} | {'LoRA' if lora else 'all'} | {'the next value' if bootstraps else 'its score'} | "
                    f"{mean['ended_at_first']:.2f}, {mean['ended']:.2f} | {mean['reward']:.2f} ({rewards}) | "
                    f"{mean['value']:.2f} |",
                    flush=True,
                )
    Path(__file__).with_name("results.json").write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
