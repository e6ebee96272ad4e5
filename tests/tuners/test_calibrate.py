"""DyLoRA cut by what it sees of data: which components a rank keeps, and how long that holds."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from peft_dynamic import (
    AdapterMoments,
    DyLoRAConfig,
    adapter_moments,
    budget_ranks,
    calibrate,
    export_lora,
    hotswap_adapter,
    rank_curve,
    resize_adapter,
    set_rank,
)
from peft_dynamic.tuners.dylora.weigh import weigh
from tests.conformance.cases import perturb
from tests.processes import python
from tests.tuners.common import tiny_llama

TARGETS = ["q_proj", "down_proj"]


def adapted(**settings: Any) -> Any:
    config = {"r": 4, "ranks": [1, 2, 4], "lora_alpha": 6, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    model = get_peft_model(tiny_llama(), DyLoRAConfig(**(config | settings)))
    perturb(model)
    return model.eval()


def batches(count: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 60, (2, 7), generator=generator) for _ in range(count)]
    return [{"input_ids": each, "labels": each} for each in ids]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(batches()[0]["input_ids"]).logits


def at(model: Any, rank: int) -> torch.Tensor:
    with model.at_rank(rank):
        return logits(model)


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(2, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x)


def golden() -> Any:
    """A = I and B = diag(2, 1), over a base weight of 0."""
    model = get_peft_model(One(), DyLoRAConfig(r=2, lora_alpha=2, target_modules=["a"])).eval()
    layer = model.base_model.model.a
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        layer.lora_A["default"].weight.copy_(torch.eye(2))
        layer.lora_B["default"].weight.copy_(torch.diag(torch.tensor([2.0, 1.0])))
    return model


def test_what_the_module_sees_decides_by_hand() -> None:
    model = golden()
    with model.at_rank(1):
        torch.testing.assert_close(model(torch.eye(2)), torch.diag(torch.tensor([2.0, 0.0])))
    # E[z z^T] = diag(1, 9): the weighted singular values are 2 and 3
    moments = AdapterMoments({"base_model.model.a": torch.diag(torch.tensor([1.0, 9.0]))}, {}, 1)
    weigh(model.base_model.model, "default", moments, damping=0)
    with model.at_rank(1):
        torch.testing.assert_close(model(torch.eye(2)), torch.diag(torch.tensor([0.0, 1.0])))
    torch.testing.assert_close(model(torch.eye(2)), torch.diag(torch.tensor([2.0, 1.0])))


@pytest.mark.parametrize("settings", [{}, {"use_mixer": True}])
@pytest.mark.parametrize("loss", [False, True])
def test_each_rank_is_the_best_in_the_measured_norm(settings: dict[str, Any], loss: bool) -> None:
    model, plain = adapted(**settings), adapted(**settings)
    whole = logits(model)
    moments = model.calibrate(batches(), loss=loss, damping=0.2)
    assert bool(moments.losses) == loss
    assert torch.equal(logits(model), whole)
    for name, layer in model.named_modules():
        if not hasattr(layer, "lora_views"):
            continue
        a, b = (each["default"].weight.detach().double() for each in (layer.lora_A, layer.lora_B))

        def mixed(own: torch.Tensor, measured: torch.Tensor | None) -> torch.Tensor:
            return own if measured is None else measured + 0.2 * measured.trace() / own.trace() * own

        k_a, k_b = mixed(a @ a.mT, moments.inputs[name]), mixed(b.mT @ b, moments.losses.get(name))
        # in the space of the components: the best approximation of I in the norm |K_B^(1/2) (I - X) K_A^(1/2)|
        root_a, root_b = torch.linalg.cholesky(k_a), torch.linalg.cholesky(k_b).mT
        sigma = torch.linalg.svdvals(root_b @ root_a)
        for rank in (1, 2):
            with model.at_rank(rank):
                small_a, small_b = (e["default"].weight.detach().double() for e in (layer.lora_A, layer.lora_B))
            x = torch.linalg.pinv(b) @ small_b @ small_a @ torch.linalg.pinv(a)
            error = torch.linalg.matrix_norm(root_b @ (torch.eye(4, dtype=torch.float64) - x) @ root_a)
            torch.testing.assert_close(error, sigma[rank:].square().sum().sqrt(), rtol=1e-4, atol=0)
    assert not torch.allclose(at(model, 1), at(plain, 1), atol=1e-3)


def test_it_is_saved_and_loaded_by_a_second_process(tmp_path: Path) -> None:
    model = adapted()
    model.calibrate(batches())
    tiny_llama().save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    expected = {rank: at(model, rank) for rank in (1, 2, 4)}
    torch.save(expected, tmp_path / "expected.pt")
    script = """
import sys, torch, peft_dynamic
from peft import PeftModel
from transformers import LlamaForCausalLM
from tests.tuners.test_calibrate import at
folder = sys.argv[1]
model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder + "/base"), folder + "/adapter").eval()
for rank, logits in torch.load(folder + "/expected.pt").items():
    assert torch.equal(at(model, rank), logits), rank
"""
    python("-c", script, str(tmp_path))


def test_an_export_has_the_calibrated_rank_and_resizing_gives_the_same(tmp_path: Path) -> None:
    model = adapted()
    moments = model.calibrate(batches())
    expected = at(model, 2)
    model.save_pretrained(tmp_path / "adapter")
    export_lora(model, tmp_path / "exported", 2)
    resize_adapter(tmp_path / "adapter", tmp_path / "resized", rank=2, moments=moments)
    for folder in ("exported", "resized"):
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / folder).eval()
        assert loaded.peft_config["default"].peft_type == "LORA"
        assert not any("moments" in name for name in loaded.state_dict())
        torch.testing.assert_close(logits(loaded), expected, rtol=1e-3, atol=1e-4)


def test_a_budget_goes_by_it(tmp_path: Path) -> None:
    model = adapted(ranks=None)
    before = budget_ranks(model, 0.5)
    moments = model.calibrate(batches())
    after = budget_ranks(model, 0.5)
    assert after != before
    model.save_pretrained(tmp_path / "adapter")
    resize_adapter(tmp_path / "adapter", tmp_path / "resized", parameters=0.5, moments=moments)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "resized").eval()
    with model.at_rank(after):
        torch.testing.assert_close(logits(model), logits(loaded), rtol=1e-3, atol=1e-4)


def test_a_step_ends_it_with_a_warning() -> None:
    model = adapted()
    model.calibrate(batches())
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model(**batches()[0]).loss.backward()
    optimizer.step()
    twin = adapted()
    twin.load_state_dict({name: value for name, value in model.state_dict().items() if "moments" not in name})
    model.eval()
    with pytest.warns(UserWarning, match="trained since it was calibrated"):
        found = at(model, 1)
    assert torch.equal(found, at(twin, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(at(model, 1), found)
    assert not any("moments" in name for name in model.state_dict())


def test_a_checkpoint_without_it_takes_it_away(tmp_path: Path) -> None:
    plain, model = adapted(), adapted()
    model.calibrate(batches())
    plain.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "calibrated")
    expected = {"plain": at(plain, 1), "calibrated": at(model, 1)}
    assert not torch.allclose(expected["plain"], expected["calibrated"], atol=1e-3)
    for folder in ("plain", "calibrated", "plain"):
        model.load_adapter(tmp_path / folder, "default")
        model.eval()
        assert torch.equal(at(model, 1), expected[folder]), folder
    for folder in ("calibrated", "plain"):
        hotswap_adapter(model, tmp_path / folder)
        assert torch.equal(at(model, 1), expected[folder]), folder


def test_copies_and_other_dtypes_keep_it() -> None:
    model = adapted()
    model.calibrate(batches())
    expected = at(model, 1)
    twin = copy.deepcopy(model)
    assert torch.equal(at(twin, 1), expected)
    twin.double()
    torch.testing.assert_close(at(twin, 1).float(), expected, rtol=1e-4, atol=1e-4)
    twin.half().float()  # the factors are rounded, the moments are not
    torch.testing.assert_close(at(twin, 1), expected, rtol=0.05, atol=0.05)
    assert torch.equal(at(model, 1), expected)


def test_it_is_measured_at_the_full_rank_and_leaves_the_set_one() -> None:
    model, other = adapted(), adapted()
    set_rank(model, 2)
    whole = adapter_moments(other, batches())
    first, second = model.calibrate(batches()), other.calibrate(batches())
    assert second.tokens == whole.tokens
    assert all(torch.equal(second.losses[name], value) for name, value in whole.losses.items())
    assert model.get_rank() == 2
    assert all(torch.equal(first.inputs[name], second.inputs[name]) for name in second.inputs)
    assert torch.equal(logits(model), at(other, 2))


def test_it_can_be_done_again() -> None:
    model, other = adapted(), adapted()
    model.calibrate(batches(1), loss=False)
    model.calibrate(batches())
    other.calibrate(batches())
    assert torch.equal(at(model, 1), at(other, 1))


def test_what_cannot_be_calibrated_is_refused() -> None:
    prefix = adapted(truncation="prefix")
    with pytest.raises(ValueError, match="truncation='prefix'"):
        prefix.calibrate(batches())
    model = adapted()
    before = at(model, 1)
    with pytest.raises(ValueError, match="batches is empty"):
        model.calibrate([])
    with pytest.raises(ValueError, match="damping=-1"):
        model.calibrate(batches(), damping=-1)
    assert torch.equal(at(model, 1), before)
    lora = get_peft_model(tiny_llama(), LoraConfig(target_modules=TARGETS))
    with pytest.raises(ValueError, match="no DyLoRA adapter"):
        calibrate(lora, batches())


def test_moments_of_other_layers_are_refused_when_they_are_read(tmp_path: Path) -> None:
    model = adapted()
    model.calibrate(batches())
    schedule = model.base_model._schedule("default")
    schedule.keep_moments([(torch.eye(4), torch.eye(4))])
    with pytest.raises(ValueError, match="calibrated with other target_modules or ranks"):
        model.set_rank(2)


def test_one_pass_or_many_batches_are_the_same_sum() -> None:
    model = adapted()
    parts = [adapter_moments(model, [batch]) for batch in batches()]
    whole = adapter_moments(model, batches())
    for name, value in whole.inputs.items():
        torch.testing.assert_close(sum(part.inputs[name] for part in parts) / 3, value)


def test_loading_something_else_leaves_it(tmp_path: Path) -> None:
    model, other = adapted(), adapted()
    model.calibrate(batches())
    expected = at(model, 1)
    other.save_pretrained(tmp_path / "plain")
    model.load_adapter(tmp_path / "plain", "other")
    model.eval()
    assert torch.equal(at(model, 1), expected)
    model.load_state_dict({}, strict=False)
    assert torch.equal(at(model, 1), expected)


def test_layers_that_share_factors_cannot_be_calibrated() -> None:
    from tests.tuners.test_stock_ranks import tied

    base = tied().unload()
    targets = {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True, "task_type": "CAUSAL_LM"}
    model = get_peft_model(base, DyLoRAConfig(r=4, **targets))
    with pytest.raises(ValueError, match="ensure_weight_tying=True"):
        model.calibrate(batches())


def test_a_curve_can_leave_it_out_and_names_what_it_lacks() -> None:
    model = adapted()
    ids = batches()[0]["input_ids"]

    def one(**how: Any) -> float:
        rows = rank_curve(model, lambda m: {"x": float(m(ids).logits[0, 0, 0])}, [1], base=False, progress=False, **how)
        return rows[1]["x"]

    plain = one()
    moments = model.calibrate(batches())
    calibrated = one()
    assert calibrated != plain
    assert one(cut="plain") == one(moments=moments, cut="plain") == plain
    assert one(moments=moments) == pytest.approx(calibrated, rel=1e-5)
    assert one() == calibrated
    for how, message in (
        ({"cut": "loss"}, "cut='loss' needs moments"),
        ({"cut": "bogus"}, "cut='bogus': must be"),
        ({"damping": -1}, "damping=-1"),
        ({"moments": AdapterMoments(moments.inputs, {}, 1), "cut": "loss"}, "needs moments with loss=True"),
    ):
        with pytest.raises(ValueError, match=message):
            one(**how)
    with pytest.raises(TypeError, match="moments must be what adapter_moments gives, or None, got dict"):
        one(moments={})


def test_compiled_training_at_rank_0_has_fresh_bases() -> None:
    """A layer that is set to rank 0 is trained at the drawn rank all the same."""
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = adapted(rank_sampling="uniform")
        model.set_rank({"q_proj": 0})
        run = torch.compile(model, backend="eager") if compiled else model
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        run.train()
        losses.append([])
        for batch in batches(6):
            loss = run(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
        torch._dynamo.reset()
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
