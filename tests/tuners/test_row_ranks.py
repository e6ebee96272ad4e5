"""Rows of one batch at ranks of their own: each computes what it computes by itself at its rank, or is refused."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration, set_seed

from peft_dynamic import DyLoRAConfig, at_rank
from tests.stock_cases import Convolutions
from tests.tuners.common import a_layer, rows, tiny_llama
from tests.tuners.test_stock_ranks import adapted as stock
from tests.tuners.test_stock_ranks import fingerprint
from tests.tuners.test_threads import perturbed

RANKS: list[Any] = [8, 1, None, 4, 2, 0]
CUTS = {
    "svd": {},
    "prefix": {"truncation": "prefix"},
    "svd, mixed": {"use_mixer": True},
    "prefix, mixed": {"truncation": "prefix", "use_mixer": True},
}
SCALINGS = ["alpha/r", "alpha/b", "alpha/sqrt(b)", "alpha/sqrt(r*b)"]


def of(output: Any) -> torch.Tensor:
    return getattr(output, "logits", output)


@torch.no_grad()
def apart(model: Any, ranks: list[Any], inputs: torch.Tensor) -> torch.Tensor:
    """Each row by itself, at its rank."""
    found = []
    for rank, row in zip(ranks, inputs.split(1), strict=True):
        with model.disable_adapter() if rank in (0, None) else at_rank(model, rank):
            found.append(of(model(row)))
    return torch.cat(found)


@torch.no_grad()
def together(model: Any, ranks: list[Any], inputs: torch.Tensor) -> torch.Tensor:
    return of(model(inputs, ranks=ranks))


def check(model: Any, ranks: list[Any], inputs: torch.Tensor, atol: float = 1e-5) -> None:
    expected = apart(model, ranks, inputs)
    assert (expected[0] - expected[1]).abs().max() > 1e-3  # else it would show nothing
    torch.testing.assert_close(together(model, ranks, inputs), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("cut", CUTS)
def test_logits_are_those_of_the_rows_apart(cut: str, scaling: str) -> None:
    model = perturbed(scaling=scaling, **CUTS[cut])
    with torch.no_grad():
        for parameter in model.parameters():  # updates of the base weights' size
            parameter.mul_(0.5)
    check(model, RANKS, rows(6))
    model.double()
    check(model, RANKS, rows(6), 1e-12)
    check(model, [2, 1, None], rows(3), 1e-12)  # none at the full rank
    model.set_rank(2)
    check(model, [4, 1, 8], rows(3), 1e-12)
    assert model.get_rank() == 2


@pytest.mark.parametrize("rank", [4, 8])
@pytest.mark.parametrize("cut", CUTS)
def test_what_is_kept_for_one_rank_is_not_taken_for_rows(cut: str, rank: int) -> None:
    model = perturbed(**CUTS[cut])
    expected = apart(model, [rank, 1], rows(2))
    model.set_rank(rank)
    for _ in range(2):  # factors that were computed are kept between passes at the same rank
        alone = together(model, None, rows(2))
        torch.testing.assert_close(alone[0], expected[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(together(model, [rank, 1], rows(2)), expected, rtol=0, atol=1e-5)


def test_caps_budgets_and_scales_of_modules() -> None:
    model = perturbed(rank_pattern={"k_proj": 3}, alpha_pattern={"up_proj": 3}, scaling="alpha/b")
    budget = {"q_proj": 0, "layers.1.mlp.up_proj": 5, "k_proj": 2}
    for name in ("layers.0", "layers.1"):
        layer = model.base_model.model.model.get_submodule(f"{name}.mlp.down_proj")
        layer.scale_layer(1.5)
    with pytest.warns(UserWarning, match="rank 5 is not one of the trained ranks"):
        check(model.double(), [budget, 4, 8], rows(3), 1e-12)
    with pytest.warns(UserWarning, match="rank 3 is not one of the trained ranks"):
        together(perturbed(), [3], rows(1))


def test_weights_that_change_from_outside() -> None:
    model = perturbed()
    check(model, [2, 8], rows(2))
    layer = a_layer(model)
    layer.lora_A["default"]._parameters["weight"].data.mul_(-2.0)
    check(model, [2, 8], rows(2))
    with torch.no_grad():
        layer.lora_B["default"]._parameters["weight"][0].normal_()
    check(model, [2, 1, 8], rows(3))


def test_a_calibrated_adapter_is_cut_by_its_moments() -> None:
    model = perturbed(rank_sampling="full")
    plain = together(model, [2, 4, 8], rows(3))
    batch = {"input_ids": rows(4, seed=5), "attention_mask": torch.ones(4, 10, dtype=torch.int64)}
    model.calibrate([{**batch, "labels": batch["input_ids"]}])
    check(model, [2, 4, 8], rows(3))
    assert (together(model, [2, 4, 8], rows(3)) - plain)[0].abs().max() > 1e-4


@pytest.mark.parametrize("cut", CUTS)
def test_gradients_in_eval_mode_are_those_of_the_rows_apart(cut: str) -> None:
    model = perturbed(scaling="alpha/b", **CUTS[cut])

    def gradients() -> list[torch.Tensor]:
        found = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        model.zero_grad()
        return found

    model(input_ids=rows(2), ranks=[4, 8]).logits.square().sum().backward()
    mine = gradients()
    for rank, row in zip([4, 8], rows(2).split(1), strict=True):
        with model.at_rank(rank):
            model(input_ids=row).logits.square().sum().backward()
    for one, other in zip(mine, gradients(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


# --- stock LoRA, and other kinds of layers


@pytest.mark.parametrize(
    ("case", "settings"),
    [("linear", {"use_rslora": True}), ("patterns", {}), ("transposed", {}), ("llama", {})],
)
def test_a_stock_lora(case: str, settings: dict[str, Any]) -> None:
    model, inputs = stock(case, **settings)
    before = fingerprint(model)
    inputs = inputs[[0, 1, 0, 1]] if len(inputs) < 4 else inputs[:4]
    check(model, [8, 2, None, 5], inputs)
    assert fingerprint(model) == before


@pytest.mark.parametrize("settings", [{}, {"truncation": "prefix", "use_mixer": True}], ids=["svd", "mixer"])
def test_convolutions(settings: dict[str, Any]) -> None:
    set_seed(0)
    config = DyLoRAConfig(r=8, ranks=[2, 4, 8], target_modules=["c1", "c2", "c3"], scaling="alpha/b", **settings)
    model = get_peft_model(Convolutions(), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    check(model, [8, 2, None, 4], torch.randn(4, 4, 7, 7))


@pytest.mark.parametrize("adapter", [LoraConfig, DyLoRAConfig], ids=["lora", "dylora"])
def test_a_quantised_base(adapter: Any) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    set_seed(0)
    base = nn.Sequential(bitsandbytes.nn.Linear4bit(64, 64), nn.Tanh(), bitsandbytes.nn.Linear4bit(64, 64)).to("cpu")
    base.is_loaded_in_4bit = True
    model = get_peft_model(base, adapter(r=8, target_modules=["0", "2"])).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    assert type(model.base_model.model[0]).__name__ == "Linear4bit"
    check(model, [8, 2, None], torch.randn(3, 64))


# --- generate


def generated(model: Any, ranks: list[Any], **settings: Any) -> None:
    """Left-padded rows of several lengths, together and apart."""
    ids, lengths = rows(len(ranks), 7), [7, 3, 5, 6][: len(ranks)]
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : 7 - length] = 0
        ids[row, : 7 - length] = 0
    settings = {"max_new_tokens": 8, "pad_token_id": 1, "do_sample": False} | settings
    found = model.generate(input_ids=ids, attention_mask=mask, ranks=ranks, **settings)
    each = len(found) // len(ranks)
    seen = []
    for row, (rank, length) in enumerate(zip(ranks, lengths, strict=True)):
        with model.disable_adapter() if rank is None else at_rank(model, rank):
            own = {"input_ids": ids[row : row + 1, 7 - length :], "attention_mask": torch.ones(1, length)}
            alone = model.generate(**own, **settings)[:, length:]
        mine = found[row * each : (row + 1) * each, 7:]
        width = alone.shape[1]  # beams of a row may end before those of another
        assert torch.equal(mine[:, :width], alone)
        assert (mine[:, width:] == 1).all()
        seen.append(alone)
    assert any(not torch.equal(seen[0], other) for other in seen[1:])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_cache": False},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"generation_config": GenerationConfig(num_beams=2, max_new_tokens=4, pad_token_id=1)},
    ],
    ids=["greedy", "no cache", "beams", "beams returned", "config"],
)
def test_generation(settings: dict[str, Any]) -> None:
    generated(perturbed(), [8, 1, None, 2], **settings)


def test_generation_of_a_stock_lora() -> None:
    model, _ = stock("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    generated(model, [8, 1, None, 4])
    model.generation_config.num_beams = 2  # the model's own setting
    generated(model, [8, 1])


def test_several_sequences_are_sampled_for_each_row() -> None:
    model = perturbed()
    seen: list[torch.Tensor] = []
    handle = a_layer(model).lora_A["default"].register_forward_hook(lambda _, __, z: seen.append(z))
    model.generate(input_ids=rows(2), ranks=[1, 4], do_sample=True, num_return_sequences=3, max_new_tokens=3)
    handle.remove()
    assert [z.shape[0] for z in seen] == [6, 6, 6]
    for z in seen:
        assert not z[:3, :, 1:].any()
        assert (z[3:] != 0).all()


@pytest.mark.parametrize("settings", [{"prompt_lookup_num_tokens": 2}, {"assistant_model": None}])
def test_assisted_generation_has_one_row_and_its_rank(settings: dict[str, Any]) -> None:
    model = perturbed()
    if "assistant_model" in settings:
        settings = {"assistant_model": tiny_llama(layers=1).eval()}
    ids = rows(1).repeat(1, 2)
    found = model.generate(input_ids=ids, ranks=[2], max_new_tokens=8, do_sample=False, **settings)
    with model.at_rank(2):
        assert torch.equal(found, model.generate(input_ids=ids, max_new_tokens=8, do_sample=False))
    assert not torch.equal(found, model.generate(input_ids=ids, max_new_tokens=8, do_sample=False))
    with pytest.raises(ValueError, match="assisted generate is only supported for batch_size = 1"):
        model.generate(input_ids=rows(2), ranks=[2, 8], max_new_tokens=4, **settings)


@pytest.mark.parametrize("beams", [1, 3])
def test_an_encoder_decoder_whose_encoder_sees_no_beams(beams: int) -> None:
    set_seed(0)
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, eos_token_id=63
    )
    base = T5ForConditionalGeneration(config)
    model = get_peft_model(base, DyLoRAConfig(r=8, target_modules="all-linear", task_type="SEQ_2_SEQ_LM")).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    settings = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False}
    found = model.generate(input_ids=rows(2), ranks=[1, 8], **settings)
    for row, rank in enumerate([1, 8]):
        with model.at_rank(rank):
            alone = model.generate(input_ids=rows(2)[row : row + 1], **settings)
        assert torch.equal(found[row, : alone.shape[1]], alone[0])
    assert not torch.equal(found[0], model.generate(input_ids=rows(2)[:1], **settings)[0])


# --- threads and processes


def test_threads_take_turns() -> None:
    model = perturbed()
    wanted: list[list[Any]] = [[1, 8], [None, 2], [4, 1], [8, 8]]
    expected = [apart(model, ranks, rows(2)) for ranks in wanted]
    start = threading.Barrier(4)

    def serve(place: int) -> None:
        start.wait(timeout=60)
        for _ in range(8):
            torch.testing.assert_close(together(model, wanted[place], rows(2)), expected[place], rtol=0, atol=1e-5)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(serve, place) for place in range(4)]:
            done.result(timeout=120)


def test_a_pass_outside_is_refused_while_rows_have_ranks() -> None:
    model = perturbed()

    def other(*_: Any) -> None:
        with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="inside `at_rank` on this model"):
            pool.submit(lambda: model(input_ids=rows(2))).result(timeout=60)

    handle = model.base_model.model.model.layers[1].register_forward_pre_hook(other)
    together(model, [1, 2], rows(2))
    handle.remove()


def test_under_ddp(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = perturbed()
        with torch.no_grad():
            found = DistributedDataParallel(model)(input_ids=rows(2), ranks=[1, 8]).logits
        torch.testing.assert_close(found, apart(model, [1, 8], rows(2)), rtol=0, atol=1e-5)
    finally:
        torch.distributed.destroy_process_group()
