"""Every rank from one run: what each way of getting it gives, at equal steps, on the same rows and seeds."""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import get_linear_schedule_with_warmup

from benchmarks.study import Cell, Context
from benchmarks.tasks import Batch, Data, Task, evaluate, labelled, load, logits_and_labels, loss_of, rows_of
from benchmarks.training import descended, fit
from peft_dynamic import AdapterMoments, DyLoRAConfig, adapter_moments, budget_ranks, resize_adapter
from peft_dynamic.functional.products import grams
from peft_dynamic.functional.ranks import bases_of

# How a finished LoRA is cut -> the arguments of resize_adapter, and whether modules share a budget
CUTS: dict[str, tuple[dict[str, Any], bool]] = {
    "plain": ({"cut": "plain"}, False),
    "inputs": ({"cut": "inputs"}, False),
    "loss": ({"cut": "loss"}, False),
    "plain, shared": ({"cut": "plain"}, True),
    "loss, shared": ({"cut": "loss"}, True),
}
Curve = dict[int, dict[str, float]]


def build(task: Task, cell: Cell, context: Context) -> Any:
    labels = 1 if task.metric == "pearson_spearman" else 2
    base, task_type = load(task, cell["seed"], context.paths["models"], labels)
    alpha = {"r/2": cell["rank"] / 2, "r/6": cell["rank"] / 6}.get(cell["alpha"], cell["alpha"])
    common: dict[str, Any] = {
        "task_type": task_type,
        "target_modules": list(task.targets),
        "lora_alpha": alpha,
        "r": cell["rank"],
    }
    settings = context.settings["dylora"].get(cell["arm"])
    if settings is None:
        return get_peft_model(base, LoraConfig(**common))
    ranks = context.settings["ranks"]
    return get_peft_model(base, DyLoRAConfig(ranks=ranks, rank_seed=cell["seed"], **settings, **common))


def layers(model: Any) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_embedding_A")}


def gain(ranks: list[int]) -> torch.Tensor:
    """MatryoshkaLoRA's diagonal: of component i the share of the ranks that have it, 1 for the first."""
    return torch.tensor([sum(rank >= i for rank in ranks) / len(ranks) for i in range(1, ranks[-1] + 1)])


def descend(
    model: Any, batches: Iterator[Batch], parameters: list[Any], lr: float, steps: int, after: Any = None
) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    if after is not None:
        optimizer.register_step_post_hook(lambda *_: after())
    schedule = get_linear_schedule_with_warmup(optimizer, round(0.06 * steps), steps)
    model.train()
    fit(optimizer, schedule, batches, lambda batch: descended(loss_of(*logits_and_labels(model, batch))))


def factors_apart(model: Any, decay: float) -> list[dict[str, Any]]:
    """The factors, which decay, and all else that is trained, which does not."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in named if ".lora_" in name], "weight_decay": decay},
        {"params": [p for name, p in named if ".lora_" not in name], "weight_decay": 0.0},
    ]


class Steepening:
    """In the last fifth of the steps, after every second one: what a cut to a drawn rank would drop shrinks by a share.

    With E_b and F_b of the cut to b, B becomes B (I - share (I - E_b F_b)): the components beyond b lose that share of
    their singular values, the others keep theirs.
    """

    def __init__(self, model: Any, share: float, steps: int, ranks: list[int], seed: int) -> None:
        self.layers, self.share, self.ranks = list(layers(model).values()), share, ranks[:-1]
        self.first, self.done = round(0.8 * steps), 0
        self.draw = random.Random(seed)

    @torch.no_grad()
    def __call__(self) -> None:
        self.done += 1
        if self.done <= self.first or self.done % 2:
            return
        rank = self.draw.choice(self.ranks)
        for layer in self.layers:
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            gram_a, gram_b = grams(a, b)
            e, f = bases_of(gram_a[None], gram_b[None])
            kept = (e[0, :, :rank] @ f[0, :rank]).to(b.dtype)
            b.lerp_(b @ kept, self.share)


@contextmanager
def through(model: Any, change: Any) -> Iterator[None]:
    """With `change(name, z)` in place of each z = A x."""

    def hook_of(name: str) -> Any:
        return lambda module, args, z: change(name, z)

    handles = [layer.lora_A["default"].register_forward_hook(hook_of(name)) for name, layer in layers(model).items()]
    yield
    for handle in handles:
        handle.remove()


def calibrated(model: Any, data: Data, cell: Cell, batches: int) -> AdapterMoments:
    """Of further rows of the training file, in an order of their own; as the training's passes are."""
    with torch.autocast("cpu", torch.bfloat16):
        return adapter_moments(model, map(labelled, data.batches(batches, cell["seed"] + 1000)))


def cut_curve(model: Any, rows: list[Batch], task: Task, ranks: list[int], cut: str, **more: Any) -> Curve:
    how, shared = CUTS[cut]
    whole = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    found = {}
    for rank in ranks[:-1]:
        budget = {"parameters": whole * rank // ranks[-1]} if shared else {"rank": rank}
        resize_adapter(model, "small", **budget, **how, **more)
        model.set_adapter("small")
        found[rank] = evaluate(model, rows, task.metric)
        model.set_adapter("default")
        model.delete_adapter("small")
    return found


class Cores:
    """E_b (r, b) and F_b (b, r) of each module and small rank, started as the cut and trained with A and B frozen."""

    def __init__(self, model: Any, ranks: list[int], moments: AdapterMoments) -> None:
        self.rank = ranks[0]
        self.pairs: dict[tuple[str, int], tuple[torch.nn.Parameter, torch.nn.Parameter]] = {}
        for name, layer in layers(model).items():
            a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
            gram_a, gram_b = grams(a, b, (moments.inputs[name], moments.losses[name]))
            e, f = bases_of(gram_a[None], gram_b[None])
            balance = (f[0].norm(dim=1) / e[0].norm(dim=0)).sqrt()
            e, f = (e[0] * balance).float(), (f[0] / balance[:, None]).float()
            for rank in ranks:
                pair = (torch.nn.Parameter(e[:, :rank].clone()), torch.nn.Parameter(f[:rank].clone()))
                self.pairs[name, rank] = pair

    def parameters(self) -> list[torch.nn.Parameter]:
        return [each for pair in self.pairs.values() for each in pair]

    def __call__(self, name: str, z: torch.Tensor) -> torch.Tensor:
        e, f = self.pairs[name, self.rank]
        return z @ f.T @ e.T

    def in_turn(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """A small rank a step."""
        ranks = list(dict.fromkeys(rank for _, rank in self.pairs))
        for number, batch in enumerate(batches):
            self.rank = ranks[number % len(ranks)]
            yield batch


def refitted(model: Any, data: Data, rows: list[Batch], task: Task, cell: Cell, context: Context) -> Curve:
    small = [rank for rank in context.settings["ranks"] if rank <= 8]
    moments = calibrated(model, data, cell, context.settings["calibration_batches"])
    cores = Cores(model, small, moments)
    steps = cell["steps"] - round(cell["steps"] * (1 - context.settings["refit_share"]))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with through(model, cores):
        batches = cores.in_turn(data.batches(steps, cell["seed"] + 2000))
        descend(model, batches, cores.parameters(), cell["strength"], steps)
        found = {}
        for cores.rank in small:
            found[cores.rank] = evaluate(model, rows, task.metric)
    return found


def run(cell: Cell, context: Context) -> dict[str, Any]:
    task, arm = Task(**context.settings["tasks"][cell["task"]]), cell["arm"]
    data, ranks = rows_of(cell["task"], context), context.settings["ranks"]
    tuned = cell["seed"] == context.settings["tune_seed"]
    rows = data.tuning if tuned else data.evaluation
    model = build(task, cell, context)
    steps = cell["steps"]
    if arm == "refit":
        steps = round(steps * (1 - context.settings["refit_share"]))
    start = time.perf_counter()
    batches, parameters = (
        data.batches(steps, cell["seed"]),
        factors_apart(model, cell["strength"] if arm == "decay" else 0.0),
    )
    if arm == "matryoshka":
        weights = gain(ranks)
        with through(model, lambda name, z: z * weights):
            descend(model, batches, parameters, cell["lr"], steps)
    else:
        steepening = Steepening(model, cell["strength"], steps, ranks, cell["seed"]) if arm == "steep" else None
        descend(model, batches, parameters, cell["lr"], steps, steepening)
    seconds = {"train_seconds": round(time.perf_counter() - start, 1)}
    if arm in context.settings["dylora"]:
        return {"curves": ranked_curves(model, data, rows, task, cell, context)} | seconds
    curves: dict[str, Curve] = {}
    if arm == "matryoshka":
        curves["own"] = released(model, rows, task, ranks)
        for layer in layers(model).values():
            layer.lora_A["default"].weight.data *= gain(ranks)[:, None]
    curves["whole"] = {cell["rank"]: evaluate(model, rows, task.metric)}
    if arm.startswith("dedicated"):
        return {"curves": curves} | seconds
    curves["plain"] = cut_curve(model, rows, task, ranks, "plain")
    if arm == "steep":
        moments = calibrated(model, data, cell, context.settings["calibration_batches"])
        curves["loss, shared"] = cut_curve(model, rows, task, ranks, "loss, shared", moments=moments)
    if arm == "lora" and not tuned:
        start = time.perf_counter()
        moments = calibrated(model, data, cell, context.settings["calibration_batches"])
        seconds["moments_seconds"] = round(time.perf_counter() - start, 2)
        for cut in CUTS:
            if cut != "plain":
                curves[cut] = cut_curve(model, rows, task, ranks, cut, moments=moments)
        few = calibrated(model, data, cell, max(1, round(0.03 * steps)))
        curves["loss, shared, few rows"] = cut_curve(model, rows, task, ranks, "loss, shared", moments=few)
    if arm == "refit":
        curves["own"] = refitted(model, data, rows, task, cell, context)
    return {"curves": curves} | seconds


def ranked_curves(
    model: Any, data: Data, rows: list[Batch], task: Task, cell: Cell, context: Context
) -> dict[str, Curve]:
    """DyLoRA at each rank: cut by its weights, or by the loss, one rank for all modules or one budget."""
    ranks = context.settings["ranks"]
    if cell["arm"] != "dylora-calibrated":
        return {"own": ranks_of(model, rows, task, {rank: rank for rank in ranks})}
    batches = data.batches(context.settings["calibration_batches"], cell["seed"] + 1000)
    with torch.autocast("cpu", torch.bfloat16):
        model.calibrate(map(labelled, batches))
    whole = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    shared = {rank: budget_ranks(model, whole * rank // ranks[-1]) for rank in ranks[:-1]}
    return {
        "loss": ranks_of(model, rows, task, {rank: rank for rank in ranks}),
        "loss, shared": ranks_of(model, rows, task, shared | {ranks[-1]: ranks[-1]}),
    }


def ranks_of(model: Any, rows: list[Batch], task: Task, ranks: dict[int, Any]) -> Curve:
    found = {}
    for rank, setting in ranks.items():
        with model.at_rank(setting):
            found[rank] = evaluate(model, rows, task.metric)
    return found


def released(model: Any, rows: list[Batch], task: Task, ranks: list[int]) -> Curve:
    """MatryoshkaLoRA as its authors run it: the first components, without the gain that they were trained with."""
    found = {}
    for rank in ranks:
        mask = (torch.arange(ranks[-1]) < rank).float()
        with through(model, lambda name, z, mask=mask: z * mask):
            found[rank] = evaluate(model, rows, task.metric)
    return found
