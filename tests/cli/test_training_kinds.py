"""The training verbs and the kinds of base models: what a verb cannot train is refused before a weight is read."""

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("trl")

from tests.cli import common
from tests.cli.common import invoke, message, write
from tests.cli.test_training_verbs import CLASSES, DYLORA, RUN, run, weights, words

elsewhere, tiny = common.elsewhere, common.tiny  # fixtures

KINDS = {  # what config.json says; no weights are there
    "pair": {"model_type": "t5"},
    "encoder": {"model_type": "bert"},
    "sees": {"model_type": "vit"},
    "states": {"model_type": "mamba"},
}
PAIR = "a model of type 't5' is an encoder-decoder, and {} trains decoders alone. Pass a decoder, such as"
ENCODER = "a model of type 'bert' is an encoder, which sees what comes after a token, and {} trains decoders alone."


@pytest.mark.parametrize(
    ("verb", "kind", "said"),
    [
        *((verb, "pair", PAIR.format(verb)) for verb in ("sft", "soft", "ppo", "cite")),
        *((verb, "encoder", ENCODER.format(verb)) for verb in ("sft", "soft", "ppo", "cite")),
        ("ppo", "sees", "a model of type 'vit' has no head of a causal language model, and ppo trains policies"),
        ("classify", "states", "has no head for sequence classification of a model of type 'mamba', and classify"),
        ("classify", "sees", "has no head for sequence classification of a model of type 'vit', and classify"),
    ],
)
def test_a_base_model_of_another_kind_is_refused(tmp_path: Path, verb: str, kind: str, said: str) -> None:
    base = tmp_path / kind
    base.mkdir()
    (base / "config.json").write_text(json.dumps(KINDS[kind]))
    rows = write(tmp_path / "rows.jsonl", [{"prompt": "a"}])
    result = invoke(verb, "--model_name_or_path", base, "--dataset_name", rows, "--output_dir", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert f"Invalid value for --model_name_or_path: {base}: " in message(result)
    assert said in message(result)
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_configuration_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    result = invoke("sft", "--model_name_or_path", tmp_path, "--dataset_name", "x/y")
    assert result.exit_code == 1
    assert f"--model_name_or_path {tmp_path} has no configuration that loads" in message(result)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """A T5 of a few thousand weights; as with its own, the tokenizer ends each text, which its head reads."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("pair")
    sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    config = T5Config(**sizes, decoder_start_token_id=1, eos_token_id=0, pad_token_id=1)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    for path in tiny.glob("tokenizer*"):
        shutil.copy(path, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "?"}))
    return folder


def test_classify_saves_a_head_that_peft_has_no_name_for(tmp_path: Path, pair: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", CLASSES)
    settings = {**RUN, **DYLORA, "target_modules": ["q", "v"], "max_steps": 2, "output_dir": tmp_path / "out"}
    run("classify", tmp_path, model_name_or_path=pair, dataset_name=rows, **settings)
    saved = {name for name in weights(tmp_path / "out") if "classification_head" in name}
    assert len(saved) == 4  # two layers, each with a bias
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert "classification_head" in written["modules_to_save"]


def test_an_adapter_that_cannot_save_the_head_is_refused(tmp_path: Path, pair: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", CLASSES)
    given = ["--model_name_or_path", pair, "--dataset_name", rows, "--output_dir", tmp_path / "out"]
    result = invoke("classify", *given, "--adapter", "trainable_tokens", "--token_indices", "1")
    assert result.exit_code == 2, result.output
    said = "--adapter: trainable_tokens cannot save classification_head, of which the base model has no weights"
    assert said in message(result)


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("tokenizer.json", {"post_processor": None}, "writes 0 of them in a text"),
        ("tokenizer_config.json", {"pad_token": "</s>"}, "pads with it ('</s>')"),
    ],
)
def test_a_tokenizer_that_ends_no_text_is_refused(
    tmp_path: Path, pair: Path, file: str, change: dict[str, object], said: str
) -> None:
    base = shutil.copytree(pair, tmp_path / "base")
    (base / file).write_text(json.dumps(json.loads((base / file).read_text()) | change))
    rows = write(tmp_path / "rows.jsonl", CLASSES)
    result = invoke("classify", *words(model_name_or_path=base, dataset_name=rows, output_dir=tmp_path / "out"))
    assert result.exit_code == 2, result.output
    assert f"the head of a t5 reads the token that ends a text (number 0), and the tokenizer {said}" in message(result)
    assert not (tmp_path / "out").exists()
