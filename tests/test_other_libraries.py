"""Libraries that load LoRA adapters by code of their own: what they compute of ours is what our model computes."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

from peft_dynamic import DyLoRAConfig, export_lora
from peft_dynamic.tuners.dylora import set_rank
from tests import methods
from tests.cli import common
from tests.conformance.cases import perturb

tiny = common.tiny  # fixture
# Neither is a dependency of the package; the extra `test` brings them.
needs_sentence_transformers, needs_diffusers = (
    pytest.mark.skipif(find_spec(name) is None, reason=f"{name} is not here; the extra test has it")
    for name in ("sentence_transformers", "diffusers")
)
TEXTS = ["say one", "say three, please"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """A BERT of a few thousand weights, with the tokenizer of letters."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("encoder")
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(**sizes, intermediate_size=32, max_position_embeddings=64)).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.pad_token = "?"
    tokenizer.save_pretrained(folder)
    return folder


def sentences(encoder: Path) -> Any:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    words = Transformer(str(encoder))
    return SentenceTransformer(modules=[words, Pooling(16)], device="cpu")


def pooled(model: Any, encoder: Path) -> torch.Tensor:
    """The mean over a text's tokens, which sentence-transformers takes by default."""
    from transformers import AutoTokenizer

    given = AutoTokenizer.from_pretrained(encoder)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model.eval()(**given).last_hidden_state
    mask = given["attention_mask"].unsqueeze(-1)
    return (hidden * mask).sum(1) / mask.sum(1)


@needs_sentence_transformers
@pytest.mark.parametrize("rank", [1, 4])
def test_sentence_transformers_takes_an_export_and_a_twin(encoder: Path, rank: int, tmp_path: Path) -> None:
    bare = sentences(encoder).encode(TEXTS, convert_to_tensor=True)
    settings = {"r": 4, "ranks": [1, 2, 4], "target_modules": ["query", "value"], "hub_ranks": [1, 4]}
    base = BertModel.from_pretrained(encoder)
    model: Any = get_peft_model(base, DyLoRAConfig(**settings, task_type="FEATURE_EXTRACTION"))
    perturb(model)
    model.save_pretrained(tmp_path / "all")
    export_lora(model, tmp_path / "one", rank=rank)
    with model.at_rank(rank):
        expected = pooled(model, encoder)
    assert (bare - expected).abs().max() > 1e-2
    for folder, more in [("one", {}), ("all", {"adapter_kwargs": {"subfolder": f"rank-{rank}"}})]:
        stock = sentences(encoder)
        stock.load_adapter(str(tmp_path / folder), **more)
        assert type(stock.transformers_model.peft_config["default"]) is LoraConfig
        torch.testing.assert_close(stock.encode(TEXTS, convert_to_tensor=True), expected, rtol=1e-4, atol=1e-5)


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
DENOISERS = methods.configs(
    ATTENTION,
    variations=("dylora-paper", "dylora-mixer"),
    lora=True,
    own={
        "dylora": {"lora_alpha": 6},
        "moslora": {"lora_alpha": 6},
        "density-lora": {"lora_alpha": 6, "activation_modules": ["down_blocks.0.resnets.0.nonlinearity"]},
    },
)


def unet() -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


def denoised(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    noise, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 16, generator=generator)
    with torch.no_grad():
        return model.eval()(noise, torch.tensor([3, 7]), text).sample


@needs_diffusers
@pytest.mark.parametrize("method", DENOISERS)
def test_diffusers_own_loader_computes_the_adapter_of_a_unet(method: str, tmp_path: Path) -> None:
    model = unet()
    bare = denoised(model)
    model.add_adapter(DENOISERS[method]())
    perturb(model)
    if method.startswith("dylora"):
        set_rank(model, 2)
    expected = denoised(model)
    assert (bare - expected).abs().max() > 1e-2
    save_file(get_peft_model_state_dict(model), tmp_path / "pytorch_lora_weights.safetensors")
    stock = unet()
    stock.load_lora_adapter(str(tmp_path), prefix=None, use_safetensors=True)
    torch.testing.assert_close(denoised(stock), expected, rtol=1e-4, atol=1e-5)


@needs_diffusers
def test_diffusers_refuses_what_its_own_save_writes_of_ours(tmp_path: Path) -> None:
    """It writes our settings beside the factors, and reads them as LoRA's: docs/dylora.md says how to save instead."""
    model = unet()
    model.add_adapter(DENOISERS["dylora"]())
    model.save_lora_adapter(str(tmp_path))
    with pytest.raises(TypeError, match="LoraConfig"):
        unet().load_lora_adapter(str(tmp_path), prefix=None, use_safetensors=True)


@needs_diffusers
def test_a_unet_takes_a_twin_as_the_card_says(tmp_path: Path) -> None:
    config = DyLoRAConfig(r=4, ranks=[1, 2, 4], target_modules=ATTENTION, hub_ranks=[2])
    model: Any = get_peft_model(unet(), config)
    perturb(model)
    model.save_pretrained(tmp_path)
    with model.at_rank(2):
        expected = denoised(model)
    stock = PeftModel.from_pretrained(unet(), tmp_path, subfolder="rank-2")
    torch.testing.assert_close(denoised(stock), expected, rtol=1e-4, atol=1e-5)
