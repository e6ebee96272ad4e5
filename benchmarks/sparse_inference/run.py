"""One token through feed-forward blocks whose inactive neurons are skipped, against the dense model, by density.

Random weights in the shapes of SmolLM2-135M (gated, 576 x 1536) and OPT-1.3B (2048 x 8192): "projections" are those
that skip neurons, alone; "model" is a whole forward pass of one token through some layers with a small vocabulary,
dense layers and attention included, under `sparse_inference`. The activation is a ReLU behind a fixed mask, which sets
the density. Dense and sparse calls are taken in turn in one process: read the ratios.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from benchmarks.pictures import legend, panels, save, style
from benchmarks.study import Cell, Context
from benchmarks.summary import table
from benchmarks.timing import in_turn, ratios
from peft_dynamic import sparse_inference
from peft_dynamic.density.sparse import break_even, some_rows, weighted_rows

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Shape -> outputs, neurons, gated, layers of the model
SHAPES = {"SmolLM2-135M": (576, 1536, True, 12), "OPT-1.3B": (2048, 8192, False, 2)}
CACHE = 2**27  # bytes of weights taken in turn, so that no cache holds the next ones


class MaskedActivation(nn.ReLU):
    """|x| where a fixed random mask is set, and 0 elsewhere."""

    def __init__(self, neurons: int, density: float) -> None:
        super().__init__()
        self.register_buffer("mask", torch.rand(neurons) < density)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.abs() * self.mask


def projections(name: str, dtype: torch.dtype, density: float, rounds: int) -> dict[str, Any]:
    outputs, neurons, gated, _ = SHAPES[name]
    count = max(2, CACHE // (outputs * neurons * dtype.itemsize * (1 + gated)))
    down = [torch.randn(outputs, neurons).to(dtype) for _ in range(count)]
    rows = [weight.t().contiguous() for weight in down]
    up = [torch.randn(neurons, outputs).to(dtype) for _ in range(count if gated else 0)]
    hidden = torch.randn(1, outputs).to(dtype)
    x = torch.randn(1, neurons).to(dtype) * (torch.rand(neurons) < density)

    def dense() -> None:
        for i in range(count):
            if gated:
                linear(hidden, up[i])
            linear(x, down[i])

    def sparse() -> None:
        for i in range(count):
            found = x.reshape(-1).nonzero()[:, 0]
            if gated:
                some_rows(hidden, found, up[i], None)
            weighted_rows(x, found, rows[i])

    return ratios(in_turn({"dense": dense, "sparse": sparse}, rounds), "dense")["sparse"] | {"layers": count}


def build(name: str, dtype: torch.dtype, density: float) -> nn.Module:
    outputs, neurons, gated, layers = SHAPES[name]
    torch.manual_seed(0)
    if gated:
        common = {"num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": layers}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=512, hidden_size=outputs, intermediate_size=neurons, **common))
    else:
        common = {"word_embed_proj_dim": outputs, "num_attention_heads": 32, "num_hidden_layers": layers}
        model = OPTForCausalLM(OPTConfig(vocab_size=512, hidden_size=outputs, ffn_dim=neurons, **common))
    for parent in list(model.modules()):
        for child in ("act_fn", "activation_fn"):
            if hasattr(parent, child):
                setattr(parent, child, MaskedActivation(neurons, density))
    return model.to(dtype).eval()


def whole_model(name: str, dtype: torch.dtype, density: float, rounds: int) -> dict[str, Any]:
    dense, sparse = build(name, dtype, density), build(name, dtype, density)
    token = torch.tensor([[7]])
    with torch.no_grad(), sparse_inference(sparse, max_density=1.0) as state:
        sparse(input_ids=token)
        found, expected = sparse(input_ids=token).logits.float(), dense(input_ids=token).logits.float()
        calls = {"dense": partial(dense, input_ids=token), "sparse": partial(sparse, input_ids=token)}
        timed = ratios(in_turn(calls, rounds), "dense")["sparse"]
        assert all(row.sparse_tokens and not row.dense_tokens for row in state.layers)
    return timed | {"difference": float((found - expected).abs().max() / expected.abs().max())}


def plot(record: dict[str, Any], context: Context) -> None:
    figure, axes = panels(2, 9.5, 4.4, sharey=True)
    for axis, what in zip(axes, ("projections", "model"), strict=True):
        lines = [(name, dtype, found[what]) for name, each in record["shapes"].items() for dtype, found in each.items()]
        for number, (name, dtype, found) in enumerate(lines):
            look = style(number) | {"ls": "-" if dtype == "float32" else "--", "label": f"{name}, {dtype}"}
            axis.plot([100 * float(d) for d in found], [1 / each["ratio_median"] for each in found.values()], **look)
        axis.axhline(1, color="0.4", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_yscale("log", base=2)
        ticks = [0.5, 1, 2, 4, 8, 16]
        axis.set_yticks(ticks, [f"{tick:g}x" for tick in ticks])
        axis.set_xticks([2, 5, 10, 20, 50, 90], ["2", "5", "10", "20", "50", "90"])
        axis.minorticks_off()
        axis.set_xlabel("active neurons, %")
        axis.set_title({"projections": "the projections that skip", "model": "whole model, one token"}[what])
    axes[0].set_ylabel("speed, times the dense model's")
    legend(figure, axes, 2)
    ten = {
        what: 1 / record["shapes"]["OPT-1.3B"]["float32"][what]["0.1"]["ratio_median"]
        for what in ("projections", "model")
    }
    finding = (
        f"With 10 % of the neurons active the projections are {ten['projections']:.1f} times faster, and a token "
        f"{ten['model']:.2f} times (OPT-1.3B's shape, float32)"
    )
    save(figure, context.folder / "speed.png", finding)


@torch.no_grad()
def run(cell: Cell, context: Context) -> dict[str, Any]:
    name, dtype, rounds = cell["shape"], DTYPES[cell["dtype"]], context.settings["rounds"]
    outputs, neurons, gated, _ = SHAPES[name]
    densities = context.settings["densities"]
    found = {
        "break_even": break_even(neurons, outputs, dtype, gated),
        "projections": {str(d): projections(name, dtype, d, rounds) for d in densities},
        "model": {str(d): whole_model(name, dtype, d, rounds) for d in densities},
    }
    return {"rounds": rounds, "shapes": {name: {cell["dtype"]: found}}}


def report(record: dict[str, Any], context: Context) -> str:
    plot(record, context)
    lines, densities = [], []
    for name, results in record["shapes"].items():
        for label, found in results.items():
            for what in ("projections", "model"):
                densities = [f"{100 * float(d):g} %" for d in found[what]]
                speeds = [f"{1 / each['ratio_median']:.2f}x" for each in found[what].values()]
                lines.append([f"{name}, {what}", label, f"{found['break_even']:.2f}", *speeds])
    return table(["shape", "dtype", "break-even", *densities], lines)
