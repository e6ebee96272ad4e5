"""`peft-dynamic export`: a saved adapter as a stock LoRA, as a whole model, or as a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from peft_dynamic.cli._answer import DRY_RUN, JSON, answering
from peft_dynamic.cli._edge import blame
from peft_dynamic.cli._given import ADAPTER, Engine, bad_input, check_file, check_model, require
from peft_dynamic.cli._subject import adapter_folder, read_config
from peft_dynamic.cli._wanted import Wanted
from peft_dynamic.cli._written import check_place, shapes_in, tell
from peft_dynamic.methods import method_of


def export(
    adapter: ADAPTER,
    out: Annotated[
        Path | None, typer.Argument(help="The folder to write. It may be left out with --gguf.", show_default=False)
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="The rank to write, of a DyLoRA or QDyLoRA adapter.", min=1, show_default=False)
    ] = None,
    model: Annotated[str | None, typer.Option(help="The base model, if it is not where the adapter says.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Write a whole model: base and update in one.")] = False,
    depth: Annotated[
        int | None, typer.Option(help="Keep the first layers alone, with --merge or of a model.", show_default=False)
    ] = None,
    gguf: Annotated[
        Path | None, typer.Option(help="Write it for llama.cpp too: the LoRA, or with --merge the model.")
    ] = None,
    llama_cpp: Annotated[
        Path | None, typer.Option(help="A checkout of llama.cpp, whose converters --gguf takes.", show_default=False)
    ] = None,
    engine: Annotated[
        Engine, typer.Option(help="Who reads the LoRA. For vllm and llama.cpp all modules are padded to one rank.")
    ] = Engine.peft,
    dry_run: DRY_RUN = False,
    as_json: JSON = False,
) -> None:
    """Write an adapter, of DyLoRA one rank of it, as a stock LoRA checkpoint for PEFT, vLLM or a converter.

    For example: peft-dynamic export peft-dynamic-out/adapter out/rank-4 --rank 4
    """
    if out is None and gguf is None:
        raise typer.BadParameter("missing. Pass the folder to write, or --gguf with a file.", param_hint="OUT")
    whole = Path(adapter).expanduser()
    is_model = (whole / "config.json").is_file() and not (whole / "adapter_config.json").is_file()
    folder = whole if is_model else adapter_folder(adapter)
    written = {} if is_model else read_config(folder)
    reader = "llama.cpp" if gguf is not None else engine.value
    wanted = Wanted(adapter, folder, written, out, rank, model, merge, depth, gguf, llama_cpp, reader, dry_run)
    _check(wanted)
    with answering(as_json) as answer:
        if is_model or merge:
            from peft_dynamic.cli._whole import write_model as write
        else:
            from peft_dynamic.cli._lora import write_lora as write
        answer |= {"out": out, "gguf": gguf, "written": not dry_run, "rank": rank, "depth": depth, **write(wanted)}
        if dry_run:
            tell(answer, out or gguf)
            return
        kind = "model" if is_model or merge else "stock LoRA adapter"
        places = " and ".join(str(path) for path in (out, gguf) if path is not None)
        typer.echo(f"{wanted.title} is in {places}, as a {kind}.")


def _check(wanted: Wanted) -> None:
    """Raise for what shows without a library."""
    _check_files(wanted)
    if wanted.written:
        _check_adapter(wanted)
    else:
        require(wanted.depth is not None, "ADAPTER", wanted.adapter, "an adapter; of a model pass --depth")
        require(wanted.rank is None, "--rank", wanted.rank, "left out: a model has no ranks")
        require(wanted.model is None, "--model", wanted.model, "left out: ADAPTER is a model itself")
    if wanted.model is not None and (wanted.merge or wanted.gguf):
        check_model(wanted.model)


def _check_files(wanted: Wanted) -> None:
    merge = wanted.merge or not wanted.written
    if wanted.depth is not None:
        require(wanted.depth >= 1, "--depth", wanted.depth, "at least 1")
        require(merge, "--depth", wanted.depth, "with --merge: the first layers are a model, and no LoRA")
    require(not merge or wanted.engine != "vllm", "--engine", wanted.engine, "left out: a model has no ranks")
    if wanted.gguf is not None:
        require(wanted.gguf.suffix == ".gguf", "--gguf", wanted.gguf, "a file that ends in .gguf")
        check_file(wanted.gguf, "--gguf")
    if wanted.out is None:
        return
    with bad_input("OUT"):
        check_place(wanted.out, wanted.folder)
        if merge and wanted.out.is_dir() and any(wanted.out.iterdir()):
            raise FileExistsError(f"{wanted.out} is not empty, and a model gets a folder of its own. Pass a new one.")


def _check_adapter(wanted: Wanted) -> None:
    adapter, kind, method, rank = wanted.adapter, wanted.kind, method_of(wanted.written), wanted.rank
    if kind == "LORA" and not wanted.merge and not wanted.gguf:
        raise typer.BadParameter(
            f"{adapter} is a stock LoRA adapter already. peft-dynamic resize writes another rank of it.",
            param_hint="ADAPTER",
        )
    if method is not None and not method.engines:
        raise typer.BadParameter(
            f"{adapter} is a {kind} adapter: {method.not_lora}, which no LoRA can express.",
            param_hint="ADAPTER",
        )
    if wanted.merge and kind != "LORA" and method is None:
        raise typer.BadParameter(f"{adapter} is a {kind} adapter, which is not merged here.", param_hint="ADAPTER")
    if wanted.merge and kind == "QDYLORA":
        raise typer.BadParameter(
            f"{adapter} was trained over a quantised model, in which the sum would be rounded away. Export the LoRA "
            "without --merge, and load it on the quantised model; or merge that LoRA with --model UNQUANTISED.",
            param_hint="--merge",
        )
    _check_weights(wanted.folder)
    ranked = method is not None and method.ranked
    largest: Any = wanted.written.get("r")
    if ranked and rank is None:
        raise typer.BadParameter(f"missing. Pass the rank to write, up to {largest}.", param_hint="--rank")
    if not ranked and rank is not None:
        raise typer.BadParameter(f"{rank}: a {kind} adapter has one rank. Leave the option out.", param_hint="--rank")
    if rank is not None and isinstance(largest, int) and rank > largest:
        raise typer.BadParameter(f"{rank} is above {largest}, the largest rank of {adapter}.", param_hint="--rank")


def _check_weights(adapter: Path) -> None:
    weights = [adapter / "adapter_model.safetensors", adapter / "adapter_model.bin"]
    if not any(path.is_file() for path in weights):
        raise typer.BadParameter(f"{adapter} has no adapter_model.safetensors: pass a saved adapter.")
    if weights[0].is_file():
        with blame(str(weights[0]), "The file is damaged: save the adapter again, or take another copy."):
            shapes_in(weights[0])
