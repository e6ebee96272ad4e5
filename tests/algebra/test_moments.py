"""Second moments of what an adapter's factors see, and the cuts that they calibrate."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, T5Config, T5ForConditionalGeneration

from peft_dynamic import AdapterMoments, adapter_moments, merge_adapters, resize_adapter
from peft_dynamic.algebra.checkpoint import read_checkpoint
from tests.conformance.cases import perturb
from tests.stock_cases import CASES, build
from tests.tuners.common import rows, tiny_llama

TARGETS = ["q_proj", "down_proj"]


def adapted(**settings: Any) -> Any:
    config = LoraConfig(**({"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | settings))
    model = get_peft_model(tiny_llama(), config)
    perturb(model)
    return model.eval()


def batches(count: int = 3) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    made = []
    for _ in range(count):
        ids = torch.randint(3, 60, (2, 7))
        mask = torch.ones_like(ids)
        mask[1, 4:] = 0
        made.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return made


def test_the_moments_are_those_of_the_tokens_that_are_no_padding() -> None:
    model = adapted()
    seen: dict[str, list[torch.Tensor]] = {}
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    handles = [
        module.lora_A["default"].register_forward_hook(
            lambda _, args, output, name=name: output.retain_grad() or seen.setdefault(name, []).append(output)
        )
        for name, module in layers.items()
    ]
    data = batches()
    for batch in data:
        model(**batch).loss.backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    found = adapter_moments(model, data)
    assert found.tokens == sum(int(batch["attention_mask"].sum()) for batch in data)
    assert found.inputs.keys() == found.losses.keys() == layers.keys()
    for name, outputs in seen.items():
        keep = [batch["attention_mask"].flatten() != 0 for batch in data]
        z = torch.cat([o.detach().flatten(0, 1)[k] for o, k in zip(outputs, keep, strict=True)]).double()
        d = torch.cat([o.grad.flatten(0, 1)[k] for o, k in zip(outputs, keep, strict=True)]).double()  # type: ignore[union-attr]  # each has a gradient
        torch.testing.assert_close(found.inputs[name], z.mT @ z / found.tokens)
        scale = layers[name].scaling["default"]
        torch.testing.assert_close(found.losses[name], d.mT @ d / scale**2 / found.tokens, atol=1e-12, rtol=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_nothing_of_the_model_changes_and_a_frozen_one_works(tmp_path: Path) -> None:
    model = adapted(lora_dropout=0.5).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    first = adapter_moments(model, batches())
    assert model.training
    model.save_pretrained(tmp_path)
    frozen = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    second = adapter_moments(frozen, batches())
    for name, value in first.losses.items():  # dropout and checkpointing were off
        torch.testing.assert_close(second.losses[name], value)
        torch.testing.assert_close(second.inputs[name], first.inputs[name])
    assert adapter_moments(frozen, batches(), loss=False).losses == {}


def test_saved_and_loaded_they_calibrate_the_same_cut(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path / "whole")
    moments = adapter_moments(model, batches())
    again = AdapterMoments.load(moments.save(tmp_path / "of" / "moments.safetensors"))
    assert again.tokens == moments.tokens
    for out, given in (("one", moments), ("other", again)):
        resize_adapter(tmp_path / "whole", tmp_path / out, rank=2, moments=given)
    one, other = (read_checkpoint(tmp_path / out).products for out in ("one", "other"))
    assert all(torch.equal(product.a, other[name].a) for name, product in one.items())
    resize_adapter(model, "small", parameters=0.5, moments=moments)
    assert "small" in model.peft_config


def changed(model: Any, folder: Path, data: list[dict[str, torch.Tensor]]) -> float:
    """The squared change of the outputs of the layers' updates on the data, over all tokens and modules."""
    other = PeftModel.from_pretrained(tiny_llama(), folder).eval()
    whole = {name: m for name, m in model.named_modules() if hasattr(m, "lora_A")}
    small = {name: m for name, m in other.named_modules() if hasattr(m, "lora_A")}
    inputs: dict[str, list[torch.Tensor]] = {}
    handles = [
        m.register_forward_pre_hook(lambda _, args, name=name: inputs.setdefault(name, []).append(args[0]))
        for name, m in whole.items()
    ]
    with torch.no_grad():
        for batch in data:
            model(**batch)
    for handle in handles:
        handle.remove()
    total = 0.0
    for name, layer in whole.items():
        delta = layer.get_delta_weight("default") - small[name].get_delta_weight("default")
        for x, batch in zip(inputs[name], data, strict=True):
            kept = x.flatten(0, 1)[batch["attention_mask"].flatten() != 0]
            total += float((kept @ delta.mT).detach().square().sum())
    return total


def test_a_cut_by_inputs_changes_the_layers_outputs_least(tmp_path: Path) -> None:
    model, data = adapted(), batches()
    model.save_pretrained(tmp_path / "whole")
    moments = adapter_moments(model, data)
    errors = {}
    for how in ("plain", "inputs", "loss"):
        resize_adapter(tmp_path / "whole", tmp_path / how, rank=1, moments=moments, cut=how, damping=0.0)
        errors[how] = changed(model, tmp_path / how, data)
    assert errors["inputs"] < errors["plain"]
    assert errors["inputs"] < errors["loss"]


def test_bad_moments_and_batches_are_named(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path / "whole")
    moments = adapter_moments(model, batches(1))
    name = next(iter(moments.inputs))

    def refused(message: str, **settings: Any) -> None:
        with pytest.raises((ValueError, TypeError), match=message):
            resize_adapter(tmp_path / "whole", tmp_path / "out", **({"rank": 2} | settings))
        assert not (tmp_path / "out").exists()

    refused("cut='best': must be", cut="best")
    refused("cut='loss' needs moments with loss=True", cut="loss", moments=AdapterMoments(moments.inputs, {}, 1))
    refused("cut='inputs' needs moments", cut="inputs")
    refused("damping=-1: must be", moments=moments, damping=-1)
    refused("are of another adapter", moments=AdapterMoments({}, {}, 1))
    refused("are of another adapter", moments=adapter_moments(adapted(r=2), batches(1)))
    broken = {**moments.inputs, name: moments.inputs[name] * float("nan")}
    refused("are not finite", moments=AdapterMoments(broken, moments.losses, 1))
    with pytest.raises(ValueError, match="batches is empty"):
        adapter_moments(model, [])
    with pytest.raises(ValueError, match="a batch gives no loss"):
        adapter_moments(model, [{"input_ids": rows(2)}])
    with pytest.raises(ValueError, match="the model has no LoRA layer"):
        adapter_moments(tiny_llama(), batches(1))
    model.merge_adapter()
    with pytest.raises(ValueError, match="ran in no batch: it is merged"):
        adapter_moments(model, batches(1))


def test_what_is_no_list_of_batches_is_named() -> None:
    batch = batches(1)[0]
    wrong: list[Any] = [batch, batch["input_ids"], None]
    for given in wrong:
        with pytest.raises(TypeError, match=r"batches must be a list.* Pass \[batch\] for one"):
            adapter_moments(adapted(), given)
    lists = {name: value.tolist() for name, value in batch.items()}
    wrong = [batch["input_ids"], {}, lists]
    for odd in wrong:
        with pytest.raises(TypeError, match="a batch must be a dict of tensors"):
            adapter_moments(adapted(), [odd])


def test_a_loss_of_nothing_is_no_measurement() -> None:
    model, batch = adapted().train(), batches(1)[0]
    with pytest.raises(ValueError, match="a batch has the loss nan: all its labels are -100"):
        adapter_moments(model, [batch, {**batch, "labels": torch.full_like(batch["labels"], -100)}])
    assert all(module.training for module in model.modules())
    padding = {**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])}
    with pytest.raises(ValueError, match="batches is empty, or has padding alone"):
        adapter_moments(model, [padding])


def test_of_several_active_adapters_the_first_is_measured() -> None:
    model = adapted(target_modules=["q_proj"])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    model.base_model.set_adapter(["default", "other"])
    assert {name.rpartition(".")[2] for name in adapter_moments(model, batches(1)).inputs} == {"q_proj"}
    model.base_model.set_adapter(["other", "default"])
    assert {len(moment) for moment in adapter_moments(model, batches(1)).inputs.values()} == {2}


@pytest.mark.parametrize("around", ["compile", "parallel", "mixed"])
def test_the_names_are_the_file_s_whatever_is_around_the_model(around: str) -> None:
    plain = adapted()
    wanted = adapter_moments(plain, batches(1))
    if around == "mixed":
        config = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS)
        model: Any = get_peft_model(tiny_llama(), config, mixed=True)
    else:
        model = torch.compile(plain, backend="eager") if around == "compile" else nn.DataParallel(plain)
    assert adapter_moments(model, batches(1)).inputs.keys() == wanted.inputs.keys()


def test_a_failed_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moments = adapter_moments(adapted(), batches(1))
    path = moments.save(tmp_path / "some.moments")
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="is a folder; pass the name of a file"):
        moments.save(tmp_path)
    with pytest.raises(NotADirectoryError, match="is a file, so there can be nothing in it"):
        moments.save(path / "inner")

    def full(tensors: Any, filename: Path, **more: Any) -> None:
        Path(filename).write_bytes(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr("peft_dynamic.tuners.moments.save_file", full)
    with pytest.raises(OSError, match="no space left"):
        moments.save(path)
    assert path.read_bytes() == before
    assert [*tmp_path.iterdir()] == [path]


def test_moments_that_share_a_tensor_are_saved(tmp_path: Path) -> None:
    one = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    read = AdapterMoments.load(AdapterMoments({"a": one, "b": one.mT}, {}, 3).save(tmp_path / "some.moments"))
    assert torch.equal(read.inputs["a"], one)
    assert torch.equal(read.inputs["b"], one.mT)


@pytest.mark.parametrize("scale", [None, 3.0])
def test_an_embedding_s_moments_are_those_of_the_columns_of_its_tokens(scale: float | None) -> None:
    """Gemma's embedding multiplies what it looks up, and PEFT the update with it."""
    model = adapted(target_modules=["embed_tokens", "q_proj"])
    (name, layer), *_ = ((n, m) for n, m in model.named_modules() if n.endswith("embed_tokens"))
    if scale is not None:
        layer.base_layer.embed_scale = torch.tensor(scale)
    data, found = batches(), adapter_moments(model, batches())
    a, b = layer.lora_embedding_A["default"].double(), layer.lora_embedding_B["default"].double()
    z, d, grads = [], [], []
    handle = layer.register_forward_hook(lambda _, args, output: grads.append(output) or output.retain_grad())
    for batch in data:
        model(**batch).loss.backward()
        keep = batch["attention_mask"] != 0
        z.append(a[:, batch["input_ids"][keep]].mT * (scale or 1.0))
        d.append(grads[-1].grad[keep].double() @ b)  # d / s
    handle.remove()
    z_all, d_all = torch.cat(z).detach(), torch.cat(d).detach()
    assert len(z_all) == found.tokens
    torch.testing.assert_close(found.inputs[name], z_all.mT @ z_all / found.tokens, atol=1e-9, rtol=1e-5)
    torch.testing.assert_close(found.losses[name], d_all.mT @ d_all / found.tokens, atol=1e-12, rtol=1e-4)


def test_a_cut_of_an_embedding_weighs_its_tokens_by_how_often_they_come(tmp_path: Path) -> None:
    model, data = adapted(target_modules=["embed_tokens"]), batches()
    model.save_pretrained(tmp_path / "whole", save_embedding_layers=False)
    moments = adapter_moments(model, data, loss=False)
    resize_adapter(tmp_path / "whole", tmp_path / "small", rank=1, moments=moments, damping=0.0)
    full, small = ((p.scale * p.matrices[1] @ p.matrices[0])[0].double() for p in (
        next(iter(read_checkpoint(tmp_path / end).products.values())) for end in ("whole", "small")
    ))  # fmt: skip
    ids = torch.cat([batch["input_ids"][batch["attention_mask"] != 0] for batch in data])
    counts = torch.bincount(ids, minlength=full.shape[1]).double()
    values = torch.linalg.svdvals(full * counts.sqrt())
    error = torch.linalg.matrix_norm((full - small) * counts.sqrt())
    torch.testing.assert_close(error, values[1:].square().sum().sqrt(), atol=1e-5, rtol=1e-5)


def test_a_module_that_runs_twice_has_the_sum_of_its_uses() -> None:
    model, data = adapted(), batches(2)
    once = adapter_moments(model, data)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    forward = layer.forward
    layer.forward = lambda x: (forward(x) + forward(x)) / 2  # the same output, by two uses
    twice = adapter_moments(model, data)
    assert twice.tokens == once.tokens
    for name, value in once.inputs.items():
        # each use has the whole z, and half of the gradient
        uses = 2 if name.endswith("layers.0.self_attn.q_proj") else 1
        torch.testing.assert_close(twice.inputs[name], uses * value)
        torch.testing.assert_close(twice.losses[name], once.losses[name] / uses, atol=1e-12, rtol=1e-4)


def test_modules_that_see_other_tokens_than_the_mask_are_refused() -> None:
    ids, mask = torch.randint(3, 40, (2, 5)), torch.ones(2, 5, dtype=torch.long)
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    t5 = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    model = get_peft_model(t5, LoraConfig(r=2, target_modules=["q"], task_type="SEQ_2_SEQ_LM"))
    with pytest.raises(ValueError, match=r"an encoder-decoder, whose attention_mask .* without attention_mask"):
        adapter_moments(model, [{"input_ids": ids, "attention_mask": mask, "labels": ids}])
    found = adapter_moments(model, [{"input_ids": ids, "labels": ids[:, :3].contiguous()}])
    assert len(found.inputs) == 3


class Trimmed(nn.Module):
    """Sees all tokens of a text but the last two."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.a = nn.Embedding(40, 8), nn.Linear(8, 3)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.a(self.emb(input_ids[:, :-2]))


def test_a_module_that_sees_a_part_of_the_tokens_is_refused() -> None:
    model = get_peft_model(Trimmed(), LoraConfig(r=2, target_modules=["a"]))
    batch = {"input_ids": torch.randint(3, 40, (2, 5)), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    with pytest.raises(ValueError, match=r"of shape \(2, 5\) does not fit what .*a sees, \(2, 3, 2\)"):
        adapter_moments(model, [batch], loss=False)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_layers_whose_z_no_module_gives_are_refused() -> None:
    for layers, message in (("experts", "adapts a parameter"), ("convolutions", "is a convolution")):
        base, inputs = build(layers)
        model = get_peft_model(base, LoraConfig(r=4, **CASES[layers].config))
        with pytest.raises(ValueError, match=rf"{message}.* or resize without moments"):
            adapter_moments(model, [{"x": inputs}], loss=False)


def test_a_moments_file_that_is_damaged_names_itself(tmp_path: Path) -> None:
    moments = adapter_moments(adapted(), batches(1))
    name = next(iter(moments.inputs))
    whole = moments.save(tmp_path / "moments.safetensors")
    path = tmp_path / "other.safetensors"

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=rf"other.safetensors' holds no moments \({message}.*measure again"):
            AdapterMoments.load(path)

    path.write_bytes(whole.read_bytes()[:100])
    refused("")
    path.write_bytes(b"")
    refused("")
    save_file({"x": torch.ones(1)}, path, metadata={"format": "pt"})
    refused("there is no note of adapter_moments")
    save_file({"inputs.q": torch.ones(2, 2)}, path, metadata={"adapter_moments": "{}"})
    refused("'tokens'")
    save_file({"inputs.q": torch.ones(2, 2)}, path, metadata={"adapter_moments": "{"})
    refused("Expecting property name")
    save_file({"outputs.q": torch.ones(2, 2)}, path, metadata={"adapter_moments": '{"tokens": 3}'})
    refused("'outputs'")
    AdapterMoments(moments.inputs, {name: torch.ones(2, 2)}, 3).save(path)
    refused("its matrices of inputs and losses differ")
    AdapterMoments({"q": torch.ones(3)}, {}, 3).save(path)
    refused("it has no square matrices of inputs")
    with pytest.raises(FileNotFoundError, match="is no file"):
        AdapterMoments.load(tmp_path / "nowhere")


def tasks(folder: Path) -> tuple[dict[str, float], dict[str, AdapterMoments]]:
    """Two adapters of other ranks and modules, each with the moments of its own data."""
    weights, moments = {}, {}
    for number, (weight, settings) in enumerate(((0.7, {}), (-0.4, {"r": 2, "target_modules": ["q_proj"]}))):
        model = adapted(**settings)
        perturb(model, number + 1)
        model.save_pretrained(folder / str(number))
        name = str(folder / str(number))
        weights[name], moments[name] = weight, adapter_moments(model, batches(3)[number:], loss=False)
    return weights, moments


def test_a_merge_by_moments_is_the_best_in_the_norm_of_all_data(tmp_path: Path) -> None:
    weights, moments = tasks(tmp_path)
    merge_adapters(weights, tmp_path / "small", rank=2, moments=moments, damping=0.0)
    small = read_checkpoint(tmp_path / "small").products
    whole = {name: read_checkpoint(name).products for name in weights}
    for module, product in small.items():
        total, covariance = torch.zeros(()), torch.zeros(())
        having = [name for name in weights if module in whole[name]]
        for name in having:
            part = whole[name][module]
            a, b = (matrix[0].double() for matrix in part.matrices)
            moment, inverse = moments[name].inputs[module], torch.linalg.pinv(a)
            rest = torch.eye(a.shape[1]).double() - inverse @ a
            covariance = covariance + inverse @ moment @ inverse.mT + moment.trace() / a.square().sum() * rest
            total = total + weights[name] * part.scale * b @ a
        root = torch.linalg.cholesky(covariance / len(having))
        found = (product.scale * product.matrices[1] @ product.matrices[0])[0].double()
        error = torch.linalg.matrix_norm((total - found) @ root)
        best = torch.linalg.svdvals(total @ root)[2:].square().sum().sqrt()
        torch.testing.assert_close(error, best, atol=1e-5, rtol=1e-5)


def test_a_merge_of_one_adapter_by_moments_is_its_cut_by_inputs(tmp_path: Path) -> None:
    weights, moments = tasks(tmp_path)
    name = next(iter(weights))
    merge_adapters({name: 1.0}, tmp_path / "one", rank=2, moments={name: moments[name]})
    resize_adapter(name, tmp_path / "cut", rank=2, moments=moments[name], cut="inputs")
    one, cut = (read_checkpoint(tmp_path / end).products for end in ("one", "cut"))
    for module, product in cut.items():
        a, b = product.matrices
        other_a, other_b = one[module].matrices
        torch.testing.assert_close(one[module].scale * other_b @ other_a, product.scale * b @ a, atol=1e-5, rtol=1e-4)


def test_moments_that_do_not_fit_a_merge_are_refused(tmp_path: Path) -> None:
    weights, moments = tasks(tmp_path)
    one, other = weights

    def refused(message: str, rank: Any = 2, **settings: Any) -> None:
        with pytest.raises((ValueError, TypeError), match=message):
            merge_adapters(weights, tmp_path / "out", rank, **settings)
        assert not (tmp_path / "out").exists()

    refused("moments: must be a dict with the keys of adapters", moments={one: moments[one]})
    refused("moments: must be a dict with the keys of adapters", moments=moments[one])
    refused("must be what adapter_moments or", moments={one: moments[one], other: "moments.safetensors"})
    refused("rank=None, needs none", rank=None, moments=moments)
    swapped = {one: moments[other], other: moments[one]}
    refused(r"moments\['.*'\]: they are of another adapter", moments=swapped)
    refused("damping=-1: must be a number", moments=moments, damping=-1)


def test_a_pooler_sees_one_row_of_each_text() -> None:

    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = BertForSequenceClassification(BertConfig(**sizes, intermediate_size=32))
    config = LoraConfig(r=4, target_modules=["pooler.dense", "query"], task_type="SEQ_CLS", init_lora_weights=False)
    model = get_peft_model(base, config).eval()
    name = "base_model.model.bert.pooler.dense"
    layer = model.get_submodule(name)
    seen: list[torch.Tensor] = []
    handle = layer.lora_A["default"].register_forward_hook(
        lambda _, args, out: (out.retain_grad(), seen.append(out))[1]
    )
    data = batches()
    for batch in data:
        batch["labels"] = torch.tensor([0, 1])
        model(**batch).loss.backward()
    handle.remove()
    model.zero_grad()
    found = adapter_moments(model, data)
    z, d = (torch.cat([each.detach().double() for each in kind]) for kind in (seen, [o.grad for o in seen]))  # type: ignore[union-attr,misc]  # as above
    assert len(z) == 2 * len(data)
    torch.testing.assert_close(found.inputs[name], z.mT @ z / len(z))
    scale = layer.scaling["default"]
    torch.testing.assert_close(found.losses[name], d.mT @ d / scale**2 / found.tokens)
