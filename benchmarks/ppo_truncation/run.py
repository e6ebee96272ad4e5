"""What a completion that was cut off is worth to PPO: its score, or the value of what would have come next.

The tests' tiny policy (17 tokens, one of them EOS) is paid the share of the letter b in what it wrote, at most 1, and
trained for 80 optimizer steps with `bootstrap_truncated` off and on, all parameters or a LoRA, five seeds each. With
at most 5 tokens nearly all completions are cut off; with at most 60 most end by themselves. No model is downloaded.
"""

import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

from peft import LoraConfig
from transformers import PrinterCallback

from benchmarks.study import Cell, Context, Row
from benchmarks.summary import shown, spread, table
from tests.trainers.ppo.common import LETTERS, tiny_policy, trainer

LAST = 10  # rollouts


def share(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [ids.count(LETTERS.index("b")) / len(ids) for ids in completion_ids]


def run(cell: Cell, context: Context) -> dict[str, Any]:
    settings = {name: cell[name] for name in ("bootstrap_truncated", "max_completion_length", "seed")}
    settings |= {"per_device_train_batch_size": 16, "lr_scheduler_type": "constant", "num_ppo_epochs": 2}
    if cell["lora"]:
        settings["peft_config"] = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        policy = tiny_policy(seed=cell["seed"])
        made = trainer(Path(folder), policy, share, max_steps=context.settings["steps"], **settings)
        made.remove_callback(PrinterCallback)
        made.train()
    logs = [log for log in made.state.log_history if "reward" in log]
    first, last = logs[:LAST], logs[-LAST:]
    return {
        "reward": mean(log["reward"] for log in last),
        "value": mean(log["value/mean"] for log in last),
        "ended_at_first": mean(log["completions/ended_ratio"] for log in first),
        "ended": mean(log["completions/ended_ratio"] for log in last),
    }


def report(rows: list[Row], context: Context) -> str:
    groups: dict[tuple, list[Row]] = {}
    for row in context.study.lines_of(rows):
        key = (row["max_completion_length"], row["lora"], row["bootstrap_truncated"])
        groups.setdefault(key, []).append(row)
    lines, by_seed = [], []
    seeds = sorted({row["seed"] for found in groups.values() for row in found})
    for (longest, lora, bootstraps), found in sorted(groups.items()):
        of = {name: mean(row[name] for row in found) for name in ("ended_at_first", "ended", "value")}
        kind = [longest, "LoRA" if lora else "all", "the next value" if bootstraps else "its score"]
        reward = shown(spread(row["reward"] for row in found), 2)
        lines.append([*kind, len(found), reward, *(f"{each:.2f}" for each in of.values())])
        of_seed = {row["seed"]: f"{row['reward']:.2f}" for row in found}
        by_seed.append([*kind, *(of_seed.get(seed, "") for seed in seeds)])
    kind = ["longest", "trained", "cut off is worth"]
    header = [*kind, "seeds", "reward", f"ended, first {LAST} rollouts", f"ended, last {LAST}", "value"]
    rewards = table([*kind, *(f"reward, seed {seed}" for seed in seeds)], by_seed, right=range(3, 3 + len(seeds)))
    return table(header, lines, right=range(3, 8)) + "\n\n" + rewards
