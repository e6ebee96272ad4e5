"""What every adapter of ours must do, on every kind of layer. Facts about a method live in its case."""

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from safetensors.torch import load_file
from torch import nn

from tests.conformance.cases import CASES, Case, perturb
from tests.stock_cases import build, compute

pytestmark = [
    # PEFT says these for a stock LoRA of the same settings too.
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not identify embedding layer:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted:UserWarning"),
    pytest.mark.filterwarnings("ignore:Already unmerged:UserWarning"),
    pytest.mark.filterwarnings("ignore:All adapters are already merged:UserWarning"),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def layers_of(model: nn.Module, adapter: str = "default") -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if adapter in getattr(module, "lora_views", ())}


def factors_of(layer: Any, adapter: str = "default") -> tuple[torch.Tensor, torch.Tensor]:
    """The whole A and B, past the views that the tests are about."""
    if adapter in layer.lora_A:
        return tuple(getattr(layer, name)[adapter]._parameters["weight"] for name in ("lora_A", "lora_B"))
    return tuple(getattr(layer, name)._parameters[adapter] for name in ("lora_embedding_A", "lora_embedding_B"))


def max_rank(layer: Any, adapter: str = "default") -> int:
    return getattr(layer.lora_views[adapter], "max_rank", layer.r[adapter])


def scheduled(model: nn.Module) -> list[Any]:
    """The schedules of DyLoRA's layers; none for a method that draws no ranks."""
    views = [layer.lora_views["default"] for layer in layers_of(model).values()]
    return list({view.schedule for view in views if hasattr(getattr(view, "schedule", None), "drawn")})


def fold_mixer_by_hand(layer: Any) -> None:
    """A becomes M A, one product per expert or group, and M the identity."""
    if "default" not in getattr(layer, "lora_mixer", ()):
        return
    m, (a, _) = layer.lora_mixer["default"].weight, factors_of(layer)
    with torch.no_grad():
        a.copy_(torch.einsum("nij,njk->nik", m, a.reshape(len(m), m.shape[1], -1)).reshape(a.shape))
        m.copy_(torch.eye(m.shape[1]).expand_as(m))


def fold_scales_by_hand(layer: Any) -> None:
    """B becomes [diag(omega_1) B_1, diag(omega_2) B_2], one column after another, and omega 1."""
    if "default" not in getattr(layer, "lora_scales", ()):
        return
    omega, (_, b) = layer.lora_scales["default"].weight, factors_of(layer)
    half = b.shape[1] // 2  # two sources of one rank
    with torch.no_grad():
        for row, column in itertools.product(range(b.shape[0]), range(b.shape[1])):
            b[row, column] *= omega[column // half, row]
        omega.fill_(1.0)


def matrix_by_hand(train: Any, cores: torch.Tensor) -> torch.Tensor:
    """The weight of a tensor train, from its cores one after another."""
    tensor, taken = torch.ones(1).to(cores), 0
    for shape in train.view.shapes:
        core = cores.detach()[taken : taken + shape[0] * shape[1] * shape[2]].view(shape)
        tensor, taken = torch.tensordot(tensor, core, dims=1), taken + core.numel()
    return tensor.reshape(train.in_features, train.out_features).T


def put_matrices_by_hand(layer: Any) -> None:
    """Stock factors in place of tensor trains."""
    for factors, sign, dim in ((layer.lora_A, 1, 0), (layer.lora_B, -1, 1)):
        train = factors["default"]
        weight = matrix_by_hand(train, train.cores)
        if hasattr(train, "start"):
            weight = torch.cat([weight, sign * matrix_by_hand(train, train.start)], dim)
        factors["default"] = nn.Linear(*weight.shape[::-1], bias=train.bias is not None)
        factors["default"].weight = nn.Parameter(weight)
        factors["default"].bias = train.bias


def keep_only(layer: Any, rank: int, adapter: str = "default") -> None:
    """Zero all components but the first `rank`, by PEFT's documented layouts: the tests' own idea of a truncation."""
    a, b = factors_of(layer, adapter)
    r = max_rank(layer, adapter)
    rank = min(rank, r)
    experts = layer.num_experts if isinstance(layer, ParamWrapper) else 1
    groups = getattr(layer.get_base_layer(), "groups", 1)
    with torch.no_grad():
        if experts > 1:  # (experts, r) rows of A, (r, experts) columns of B
            a.view(experts, r, -1)[:, rank:] = 0
            b.view(b.shape[0], r, experts)[:, rank:] = 0
        elif groups > 1:  # each group has its own r / groups rows
            a.view(groups, r // groups, -1)[:, rank // groups :] = 0
            b[:, rank // groups :] = 0
        else:
            a[rank:] = 0
            b[:, rank:] = 0


@every_case
def test_a_fresh_adapter_leaves_the_base_output_bit_for_bit(case: Case) -> None:
    base, inputs = build(case.layers)
    expected = compute(base, inputs)
    model, _ = case.adapted()
    model.eval()
    for rank in case.ranks:
        with case.at(model, rank):
            output = compute(model, inputs)
        if not case.base_start:
            assert not torch.allclose(output, expected, atol=1e-3)
        elif case.exact_start:
            assert torch.equal(output, expected)
        else:
            assert torch.allclose(output, expected, atol=case.tolerance)


def scale_by_the_rule(layer: Any, rule: str, rank: int) -> float:
    """Written out here once more, from the definitions."""
    alpha, r = layer.lora_views["default"].lora_alpha, max_rank(layer)
    b = min(rank, r)
    rules = {
        "alpha/b": alpha / b,
        "alpha/r": alpha / r,
        "alpha/sqrt(b)": alpha / b**0.5,
        "alpha/sqrt(r*b)": alpha / (r * b) ** 0.5,
    }
    return rules[rule]


def cut_by_hand(layer: Any, rank: int, prefix: bool) -> None:
    """Change the whole factors so that the layer at full rank computes what it should at `rank`."""
    if "default" in layer.lora_A and hasattr(layer.lora_A["default"], "cores"):
        put_matrices_by_hand(layer)
        return
    if prefix:
        keep_only(layer, rank)  # of M too all but M[:b, :b] is then multiplied by zeros
        return
    fold_mixer_by_hand(layer)
    fold_scales_by_hand(layer)
    a, b = factors_of(layer)
    r = max_rank(layer)
    rank = min(rank, r)
    experts = layer.num_experts if isinstance(layer, ParamWrapper) else 1
    groups = getattr(layer.get_base_layer(), "groups", 1)
    with torch.no_grad():
        for n in range(experts * groups):
            if experts > 1:
                part_a, part_b = a.view(experts, r, -1)[n], b.view(b.shape[0], r, experts)[:, :, n]
            else:
                size = r // groups
                part_a = a[n * size : (n + 1) * size].flatten(1)
                part_b = b[n * (len(b) // groups) : (n + 1) * (len(b) // groups)].flatten(1)
            u, s, vh = torch.linalg.svd(part_b.double() @ part_a.double(), full_matrices=False)
            kept = min(rank // groups, len(s))
            new_a, new_b = torch.zeros_like(part_a), torch.zeros_like(part_b)
            new_a[:kept] = vh[:kept].to(a.dtype)
            new_b[:, :kept] = (u[:, :kept] * s[:kept]).to(b.dtype)
            if experts > 1:
                a.view(experts, r, -1)[n] = new_a
                b.view(b.shape[0], r, experts)[:, :, n] = new_b
            else:
                a[n * size : (n + 1) * size] = new_a.view_as(a[n * size : (n + 1) * size])
                rows = slice(n * (len(b) // groups), (n + 1) * (len(b) // groups))
                b[rows] = new_b.view_as(b[rows])


@every_case
def test_a_rank_computes_its_definition(case: Case) -> None:
    """The reference: the whole factors changed by hand, run at full rank with the scale written out.

    In double precision, since some of these random models amplify rounding a hundred times.
    """
    outputs = []
    for rank in case.ranks:
        model, inputs = case.perturbed()
        model, inputs = model.double(), inputs.double() if inputs.is_floating_point() else inputs
        with case.at(model, rank):
            output = compute(model, inputs)
            scales = {name: layer.scaling["default"] for name, layer in layers_of(model).items()}
        reference = case.perturbed()[0].double()
        for name, layer in layers_of(reference).items():
            rule = getattr(reference.peft_config["default"], "scaling", None)
            expected = scale_by_the_rule(layer, rule, rank) if rule else layer.lora_alpha["default"] / max_rank(layer)
            assert scales[name] == pytest.approx(expected, rel=1e-12)
            cut_by_hand(layer, rank, case.prefix)
            layer.scaling["default"] = expected
        expected_output = compute(reference, inputs)
        # not to 1e-12: LLaMA's norms and softmax compute in single precision whatever the model's
        assert (output - expected_output).abs().max() <= 1e-5 * expected_output.abs().max()
        outputs.append(output)
    for i, first in enumerate(outputs):  # and no two ranks compute the same
        assert all(not torch.allclose(first, second, atol=1e-3) for second in outputs[i + 1 :])


@every_case
def test_merged_and_unmerged_again_is_the_forward_pass_at_every_rank(case: Case) -> None:
    if not case.mergeable:
        model, _ = case.perturbed()
        with pytest.raises(NotImplementedError):
            model.merge_adapter()
        return
    for rank in case.ranks:
        model, inputs = case.perturbed()
        # in double precision: how far rounding goes in single is the kernels' business
        model, inputs = model.double(), inputs.double() if inputs.is_floating_point() else inputs
        if case.ranked:
            model.set_rank(rank)
        forward = compute(model, inputs)
        model.merge_adapter()
        assert torch.allclose(compute(model, inputs), forward, atol=case.tolerance, rtol=1e-4)
        if case.ranked:
            with pytest.raises(ValueError, match="is merged at rank"):
                model.set_rank(case.ranks[0] if rank != case.ranks[0] else case.ranks[-1])
        model.unmerge_adapter()
        assert torch.allclose(compute(model, inputs), forward, atol=case.tolerance, rtol=1e-4)
        unloaded = model.merge_and_unload()
        assert torch.allclose(compute(unloaded, inputs), forward, atol=case.tolerance, rtol=1e-4)
        assert not any(isinstance(module, LoraLayer) for module in unloaded.modules())
        assert not unloaded._forward_pre_hooks
        assert not unloaded._forward_hooks


@every_case
def test_the_update_has_at_most_the_rank(case: Case) -> None:
    for rank in case.ranks:
        model, _ = case.perturbed()
        if case.ranked:
            model.set_rank(rank)
        for layer in layers_of(model).values():
            if getattr(layer.get_base_layer(), "groups", 1) > 1:
                continue  # block-diagonal: the rank holds per group
            delta = layer.get_delta_weight("default").detach()
            matrices = delta if isinstance(layer, ParamWrapper) and delta.ndim == 3 else delta.flatten(1)[None]
            values = torch.linalg.svdvals(matrices.double())
            above = values[:, layer.r["default"] :]
            assert not len(above[0]) or (above <= 1e-5 * values[:, :1]).all()


@every_case
def test_a_training_pass_computes_what_evaluation_does_at_that_rank(case: Case) -> None:
    model, inputs = case.perturbed()
    for schedule in scheduled(model):
        schedule.refresh()  # else the first forward pass would, and draw
    for rank in case.ranks:
        with case.at(model, rank):
            expected = compute(model.eval(), inputs)
        for schedule in scheduled(model):
            schedule.drawn = rank
        output = model.train()(inputs)
        output = getattr(output, "logits", output).detach()
        assert torch.allclose(output, expected, atol=case.tolerance, rtol=1e-4)


@every_case
def test_gradients_are_those_of_the_drawn_rank(case: Case) -> None:
    """Central difference along the gradient, in double precision; what a rank is made of stays fixed meanwhile."""
    if not case.difference_quotient:
        return
    model, inputs = case.perturbed()
    model = model.double()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    for schedule in scheduled(model):
        schedule.refresh()  # else the first forward pass would, and draw

    def loss() -> torch.Tensor:
        output = model(inputs)
        return getattr(output, "logits", output).square().mean()

    for rank in case.ranks:
        for schedule in scheduled(model):
            schedule.drawn = rank
        model.train().zero_grad()
        start = loss()
        start.backward()
        trained = [p for p in model.parameters() if p.requires_grad and p.grad is not None]
        slope = float(sum(p.grad.square().sum() for p in trained))
        step = 1e-6 * float(start.detach()) / slope
        ranked = [layer.lora_views["default"] for layer in layers_of(model).values() if case.ranked]
        for views in ranked:
            views.basis = (lambda kept: lambda: kept)(views.basis())
        ends = []
        for direction in (1, -2):
            with torch.no_grad():
                for p in trained:
                    p.add_(direction * step * p.grad)
            ends.append(float(loss().detach()))
        with torch.no_grad():
            for p in trained:
                p.add_(step * p.grad)
        for views in ranked:
            del views.basis
        assert ends[0] - ends[1] == pytest.approx(2 * step * slope, rel=1e-3)


@every_case
def test_gradients_are_exactly_zero_above_the_drawn_rank_and_only_there(case: Case) -> None:
    if not case.prefix:
        return
    model, inputs = case.perturbed()
    model.train()
    (schedule,) = scheduled(model)
    seen = set()
    while seen != set(case.ranks):
        seen.add(schedule.drawn)
        model.zero_grad()
        output = model(inputs)
        getattr(output, "logits", output).square().mean().backward()
        for layer in layers_of(model).values():
            for factor in factors_of(layer):
                gradient, whole = factor.grad, factor.detach().clone()
                with torch.no_grad():
                    factor.copy_(torch.ones_like(factor))
                    keep_only(layer, schedule.drawn)
                    used = factor.bool()
                    factor.copy_(whole)
                assert gradient[~used].eq(0).all()
                assert gradient[used].ne(0).any()
        schedule.advance()


@every_case
def test_save_and_load_keep_every_rank(case: Case, tmp_path: Any) -> None:
    model, inputs = case.perturbed()
    model.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors", ".md"}
    loaded = PeftModel.from_pretrained(build(case.layers)[0], tmp_path)
    assert not loaded.training
    for rank in case.ranks:
        with case.at(model, rank), case.at(loaded, rank):
            assert torch.equal(compute(loaded, inputs), compute(model, inputs))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    again = get_peft_model_state_dict(loaded)
    assert saved.keys() == again.keys()
    assert all(torch.equal(saved[key], again[key].cpu()) for key in saved)
    counts = any(hasattr(layer.lora_views["default"], "schedule") for layer in layers_of(model).values())
    assert sum(key.endswith("lora_schedule.step") for key in saved) == counts
    if case.second_adapter:  # the same file as a further adapter
        result = loaded.load_adapter(tmp_path, "second")
        assert not [key for key in result.missing_keys if ".second" in key]
        assert not result.unexpected_keys
        loaded.set_adapter("second")
        assert torch.equal(compute(loaded, inputs), compute(model, inputs))
    # whole factors, whatever rank was set when saving
    if case.ranked:
        model.set_rank(case.ranks[0])
    assert all(torch.equal(value, saved[key]) for key, value in get_peft_model_state_dict(model).items())


def with_another(case: Case) -> tuple[Any, torch.Tensor]:
    """The model with a second adapter, "other", which is active, and an input."""
    model, inputs = case.perturbed()
    model.add_adapter("other", case.config(**case.settings))
    model.set_adapter("other")
    perturb(model, seed=2)
    return model.eval(), inputs


@every_case
def test_two_adapters_have_ranks_of_their_own(case: Case) -> None:
    if not case.second_adapter:
        return
    model, inputs = with_another(case)
    low, high = case.ranks[0], case.ranks[-1]
    if case.ranked:
        model.set_rank(low, adapter_name="other")
        assert (model.get_rank("default"), model.get_rank("other")) == (high, low)
    other = compute(model, inputs)
    model.set_adapter("default")
    first = compute(model, inputs)
    assert not torch.allclose(first, other, atol=1e-3)
    with model.disable_adapter():
        plain = compute(model, inputs)
    model.delete_adapter("other")
    assert torch.equal(compute(model, inputs), first)
    assert torch.allclose(plain, compute(build(case.layers)[0], inputs), atol=case.tolerance)
    if case.ranked:
        with pytest.raises(ValueError, match="is no DyLoRA adapter"):
            model.set_rank(low, adapter_name="other")


@every_case
def test_mixed_batches_use_each_adapters_rank(case: Case) -> None:
    if not case.mixed_batches:
        return
    model, inputs = with_another(case)
    if case.ranked:
        model.set_rank(case.ranks[0], adapter_name="other")
        model.set_rank(case.ranks[1], adapter_name="default")
    expected = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = compute(model, inputs)
    names = ["default" if i % 2 else "other" for i in range(len(inputs))]
    with torch.no_grad():
        output = model(inputs, adapter_names=names)
    output = getattr(output, "logits", output)
    for i, name in enumerate(names):
        assert torch.allclose(output[i], expected[name][i], atol=case.tolerance, rtol=1e-4)


@every_case
def test_copies_are_independent_and_keep_the_rank(case: Case) -> None:
    model, inputs = case.perturbed()
    if case.ranked:
        model.set_rank(case.ranks[1])
    expected = compute(model, inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(compute(other, inputs), expected)
        if case.ranked:
            other.set_rank(case.ranks[0])
            assert model.get_rank() == case.ranks[1]
        else:
            perturb(other, seed=3)
        assert not torch.allclose(compute(other, inputs), expected, atol=1e-3)
    assert torch.equal(compute(model, inputs), expected)


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models_run_at_every_rank(case: Case, dtype: torch.dtype) -> None:
    model, inputs = case.perturbed()
    single, _ = case.perturbed()
    low_inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    for rank in case.ranks:
        low, reference = copy.deepcopy(model).to(dtype), copy.deepcopy(model).to(dtype)
        if case.ranked:
            low.set_rank(rank)
        output = compute(low, low_inputs)
        assert output.dtype == dtype
        # the reference's own error says how much the model amplifies the rounding of this format
        for name, layer in layers_of(reference).items():
            layer.to(torch.float32)
            cut_by_hand(layer, rank, case.prefix)
            layer.to(dtype)
            layer.scaling["default"] = layers_of(low)[name].scaling["default"]
        with case.at(single, rank):
            exact = compute(single, low_inputs.float() if inputs.is_floating_point() else inputs)
        noise = (compute(reference, low_inputs).float() - exact).abs().max()
        bound = 2 * noise + 4 * torch.finfo(dtype).eps * exact.abs().max()
        assert (output.float() - exact).abs().max() <= bound
