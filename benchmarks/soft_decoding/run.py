"""What leaving early saves: time for a token by exit, with adaptive decoding and with self-speculative decoding.

Each round takes other prompts and runs every way of decoding on them in turn, greedily, to the end of the text; the
order rotates. Time is the process's CPU time on one thread, per new token, the prompt's included, and is given over
that of `generate` in the same round: the machine is noisy, so read the ratios. Thresholds are calibrated on other rows
than those that are timed.
"""

import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.pictures import legend, panels, save, style
from benchmarks.study import Cell, Context
from benchmarks.summary import table
from benchmarks.tasks import read
from peft_dynamic.trainers import (
    assisted_exit,
    calibrate_thresholds,
    exit_at,
    generate_adaptive,
    generate_speculative,
    paper_thresholds,
)

EXITS = [9, 12, 15, 18, 21, 24, 27]
DRAFTS = [9, 15, 21, 24, 27]
ASSISTED = [15, 24]
AGREEMENTS = [0.8, 0.9, 0.98]
CALIBRATED = 32  # rows
NEW = 32  # tokens at most
WARM_UP = 1  # rounds that do not count


def rows_of(data: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows to calibrate on, and prompts to time."""
    rows = read(data / "e2e_nlg/validation.jsonl")
    random.Random(11).shuffle(rows)
    return rows[:CALIBRATED], [row["mr"] + "\n" for row in rows[CALIBRATED:]]


def calibration_batches(rows: list[dict[str, Any]], tokenizer: Any) -> list[dict[str, torch.Tensor]]:
    """One row each: the prompt, and a reference whose tokens count."""
    batches = []
    for row in rows:
        prompt = tokenizer(row["mr"] + "\n")["input_ids"]
        answer = tokenizer(row["refs"][0])["input_ids"] + [tokenizer.eos_token_id]
        ids = torch.tensor([prompt + answer])
        batches.append({"input_ids": ids, "labels": torch.where(torch.arange(ids.shape[1]) < len(prompt), -100, ids)})
    return batches


Decode = Callable[[dict[str, torch.Tensor]], tuple[torch.Tensor, dict[str, float]]]


def ways(model: Any, thresholds: dict[str, dict[int, float]], batch: int) -> dict[str, Decode]:
    """Name -> decoding: from a tokeniser's output to all tokens and what else is worth noting."""

    def plain(inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        return model.generate(**inputs, max_new_tokens=NEW, do_sample=False), {}

    def at_exit(inputs: dict[str, torch.Tensor], exit: int) -> tuple[torch.Tensor, dict[str, float]]:
        with exit_at(model, exit):
            return plain(inputs)

    def adaptive(inputs: dict[str, torch.Tensor], limits: dict[int, float]) -> tuple[torch.Tensor, dict[str, float]]:
        output = generate_adaptive(model, **inputs, thresholds=limits, max_new_tokens=NEW)
        return output.sequences, {"mean_exit": output.mean_exit}

    def speculative(inputs: dict[str, torch.Tensor], exit: int) -> tuple[torch.Tensor, dict[str, float]]:
        output = generate_speculative(model, **inputs, exit=exit, max_new_tokens=NEW)
        return output.sequences, {"acceptance": output.acceptance}

    def assisted(inputs: dict[str, torch.Tensor], exit: int) -> tuple[torch.Tensor, dict[str, float]]:
        with assisted_exit(model, exit) as how:
            return model.generate(**inputs, max_new_tokens=NEW, do_sample=False, **how), {}

    found: dict[str, Decode] = {"generate": plain}
    found |= {f"exit {exit}": partial(at_exit, exit=exit) for exit in EXITS}
    found["adaptive, never early"] = partial(adaptive, limits=dict.fromkeys(EXITS, 2.0))
    found |= {f"adaptive, {name}": partial(adaptive, limits=limits) for name, limits in thresholds.items()}
    found |= {f"speculative {exit}": partial(speculative, exit=exit) for exit in DRAFTS}
    if batch == 1:  # transformers' own takes no more
        found |= {f"transformers' {exit}": partial(assisted, exit=exit) for exit in ASSISTED}
    return found


def timed(tokenizer: Any, prompts: list[str], calls: dict[str, Decode], batch: int, least: int, seconds: float) -> Any:
    """Milliseconds per new token, notes and texts of each way, for `least` rounds and until the time is up."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    notes: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
    texts: dict[str, list[list[str]]] = {name: [] for name in calls}
    started, number = time.process_time(), 0
    while number < WARM_UP + least or time.process_time() - started < seconds:
        chosen = [prompts[(number * batch + i) % len(prompts)] for i in range(batch)]
        inputs = dict(tokenizer(chosen, return_tensors="pt", padding=True))
        length = inputs["input_ids"].shape[1]
        first = number % len(calls)
        for name in [*calls][first:] + [*calls][:first]:
            start = time.process_time()
            tokens, noted = calls[name](inputs)
            spent = time.process_time() - start
            if number >= WARM_UP:
                taken[name].append(1000 * spent / (tokens.shape[1] - length))
                notes[name].append(noted)
                texts[name].append(tokenizer.batch_decode(tokens[:, length:], skip_special_tokens=True))
        number += 1
    return taken, notes, texts


def summary(taken: Any, notes: Any, texts: Any) -> dict[str, Any]:
    """Ratios to `generate` in the same round, and how many texts are the same as its."""
    result = {}
    for name, times in taken.items():
        ratios = [mine / other for mine, other in zip(times, taken["generate"], strict=True)]
        same = [
            a == b
            for mine, other in zip(texts[name], texts["generate"], strict=True)
            for a, b in zip(mine, other, strict=True)
        ]
        result[name] = {
            "ms_per_token": statistics.mean(times),
            "ratio_median": statistics.median(ratios),
            "ratio_quartiles": statistics.quantiles(ratios, n=4),
            "speed_up": 1 / statistics.median(ratios),
            "same_text": sum(same) / len(same),
            **{key: statistics.mean(each[key] for each in notes[name]) for key in notes[name][0]},
        }
    return result


def run(cell: Cell, context: Context) -> dict[str, Any]:
    options, folder, batch = context.settings, context.paths["model"], cell["batch"]
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows, prompts = rows_of(context.paths["data"])
    thresholds: dict[str, dict[int, float]] = {"paper's thresholds": paper_thresholds(model)}
    calibrations = {}
    for agreement in AGREEMENTS:
        batches = calibration_batches(rows[: options["calibrated"]], tokenizer)
        found = calibrate_thresholds(model, batches, exits=EXITS, agreement=agreement)
        calibrations[str(agreement)] = vars(found) | {"thresholds": {str(k): p for k, p in found.thresholds.items()}}
        thresholds[f"{agreement:.0%} agreement"] = found.thresholds
    calls = ways(model, thresholds, batch)
    if chosen := options["ways"][str(batch)]:
        calls = {name: call for name, call in calls.items() if name.startswith(("generate", *chosen))}
    seconds = options["seconds"][str(batch)]
    taken, notes, texts = timed(tokenizer, prompts, calls, batch, options["rounds"], seconds)
    layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    measured = {
        "rounds": len(taken["generate"]),
        "depth": model.config.num_hidden_layers,
        "head_in_layers": model.lm_head.weight.numel() / layer,
        "calibration": calibrations,
        "ways": summary(taken, notes, texts),
    }
    return {f"{options['name']}, batch {batch}": measured}


def shown_ways(title: str, result: dict[str, Any]) -> str:
    lines = []
    for name, each in result["ways"].items():
        low, _, high = each["ratio_quartiles"]
        extra = [
            f"{each[key]:{form}}" if key in each else "" for key, form in (("mean_exit", ".1f"), ("acceptance", ".2f"))
        ]
        lines.append(
            [name, f"{each['ratio_median']:.2f}", f"{low:.2f} to {high:.2f}", f"{each['same_text']:.0%}", *extra]
        )
    header = [title, "CPU time per token over `generate`'s", "quartiles", "same text", "mean exit", "acceptance"]
    return table(header, lines)


def plot(record: dict[str, Any], context: Context) -> None:
    """Time by exit beside the ideal, and the other ways as points."""
    figure, axes = panels(len(record), 5.5 * len(record), 4.6, sharey=True)
    dearest = []
    for axis, (title, result) in zip(axes, record.items(), strict=True):
        depth, head = result["depth"], result["head_in_layers"]
        exits = [*(k for k in EXITS if f"exit {k}" in result["ways"]), depth]
        found = [result["ways"][f"exit {k}"]["ratio_median"] for k in exits[:-1]] + [1.0]
        axis.plot(exits, [k / depth for k in exits], color="0.6", linestyle=":", label="k of L layers, no head")
        ideal = [(k + head) / (depth + head) for k in exits]
        axis.plot(exits, ideal, color="0.6", linestyle="--", label="k of L layers, and the head")
        axis.plot(exits, found, label="exit_at(k)", **style(1))
        for number, (kind, label, at) in enumerate(
            (
                ("adaptive, ", "adaptive, at its mean exit", lambda each, name: each["mean_exit"]),
                ("speculative ", "speculative, at its draft's exit", lambda each, name: int(name.split()[-1])),
                ("transformers' ", "transformers' own, likewise", lambda each, name: int(name.split()[-1])),
            ),
            start=2,
        ):
            ways = {name: each for name, each in result["ways"].items() if name.startswith(kind)}
            points = [(at(each, name), each["ratio_median"]) for name, each in ways.items()]
            dearest += [time for _, time in points] if kind == "speculative " else []
            if points:
                axis.plot(*zip(*points, strict=True), label=label, **style(number) | {"ls": "none"})
        axis.axhline(1, color="0.4", linewidth=0.8)
        axis.set(xlabel="layer k", title=f"{title}: {depth} layers", xticks=[*EXITS, depth])
    axes[0].set_ylabel("CPU time per token, over generate's")
    legend(figure, axes, 3)
    finding = (
        "Leaving early saves what the layers and the head cost; exact speculation takes "
        f"{min(dearest):.2f} to {max(dearest):.2f} times as long as generate"
    )
    save(figure, context.folder / "latency.png", finding)


def report(record: dict[str, Any], context: Context) -> str:
    record = {title: result for title, result in record.items() if "ways" in result}
    plot(record, context)
    return "\n\n".join(shown_ways(title, result) for title, result in record.items())
