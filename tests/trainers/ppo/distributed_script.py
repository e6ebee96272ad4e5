"""Two steps of PPO in two processes; writes the weights and the logs.

python distributed_script.py FOLDER
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig

from tests.trainers.ppo.common import EOS, early_letters, prompts, trainer


def by_prompt(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Completions that follow from their prompts, whoever samples. The two processes get prompts of other lengths."""
    ids = trainer.generator.tokenize(prompts)
    completions = [[(5 * len(p) + i) % EOS for i in range(len(p))] + [EOS] * (len(p) % 2) for p in ids]
    pairs = zip(ids, completions, strict=True)
    logprobs = [[-float(len(p)) if len(p) != 3 else None for _ in c] for p, c in pairs]
    return {"prompt_ids": ids, "completion_ids": completions, "logprobs": logprobs, "weight": [len(p) for p in ids]}


def letters(completion_ids: list[list[int]], weight: list[int], log_metric: Any, **_: Any) -> list[float | None]:
    log_metric("longest_prompt", max(weight))
    return [None if w == 2 else value * w for value, w in zip(early_letters(completion_ids), weight, strict=True)]


def some(completions: list[str], **_: Any) -> list[float]:
    return [0.25 * len(text) for text in completions]


def made(folder: Path, **settings: Any) -> Any:
    """Without sampling, so that what is trained on does not depend on how many processes sample."""
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    defaults = {"shuffle_dataset": False, "num_ppo_epochs": 2, "max_steps": 3, "save_steps": 1, "max_grad_norm": 0.0}
    defaults |= {"eval_dataset": prompts(5), "save_strategy": "steps", "learning_rate": 1e-3, "optim": "sgd"}
    defaults |= {"rollout_func": by_prompt, "target_kl": 1e9}
    found = trainer(folder, reward_funcs=[letters, some], peft_config=adapter, **(defaults | settings))
    found.value_function.head.weight.data.copy_(torch.linspace(-1, 1, 32)[None])
    return found


def main(folder: Path) -> None:
    settings = {"per_device_train_batch_size": 2, "ddp_backend": "gloo"}
    two = made(folder, **settings)
    two.train()
    logs = [entry for entry in two.state.log_history if "loss" in entry]
    evaluated = two.evaluate()
    resumed = made(folder, **settings)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    same = all(torch.equal(p, q) for p, q in zip(two.model.parameters(), resumed.model.parameters(), strict=True))
    # And sampled: the processes draw differently for the same prompt
    sampled = trainer(folder, max_steps=1, **settings)
    own = sampled.rollouts.complete(["a"] * 4, True, (0, 0, dist.get_rank())).completion_ids()
    drawn: list[Any] = [None, None]
    dist.all_gather_object(drawn, own)
    if dist.get_rank() == 0:
        weights = {name: p.detach() for name, p in two.model.named_parameters() if p.requires_grad}
        found = {"weights": weights, "logs": logs, "eval": evaluated, "same": same, "drawn": drawn}
        torch.save(found | {"processes": two.args.world_size, "eos": EOS}, folder / "out.pt")
    for each in (two, resumed, sampled):
        each.accelerator.free_memory()
        each.model_wrapped = None
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
