"""`peft-dynamic export`: a saved adapter, of DyLoRA one rank of it, as a stock LoRA checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from peft_dynamic.cli._edge import UserError, blame
from peft_dynamic.methods import method_of


def export(
    adapter: Annotated[Path, typer.Argument(help="The folder of a saved adapter.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    rank: Annotated[
        int | None, typer.Option(help="The rank to write, of a DyLoRA or QDyLoRA adapter.", min=1, show_default=False)
    ] = None,
    model: Annotated[str | None, typer.Option(help="The base model, if it is not where the adapter says.")] = None,
) -> None:
    """Write an adapter, of DyLoRA one rank of it, as a stock LoRA checkpoint for PEFT, vLLM or a converter.

    For example: peft-dynamic export peft-dynamic-out/adapter out/rank-4 --rank 4
    """
    if not (adapter / "adapter_config.json").is_file():
        raise typer.BadParameter(f"{adapter} has no adapter_config.json: pass a saved adapter.", param_hint="ADAPTER")
    from peft_dynamic.cli._load import model_class, read_json

    written = read_json(adapter / "adapter_config.json")
    _check(adapter, written)
    from peft import PeftConfig, PeftModel

    import peft_dynamic.tuners  # noqa: F401  # registers the adapter types
    from peft_dynamic.export import check_target, export_lora

    try:
        check_target(out)
    except OSError as error:
        raise typer.BadParameter(str(error), param_hint="OUT") from error
    again = "Save the adapter again, or take another copy."
    with blame(f"{adapter / 'adapter_config.json'} is no configuration of an adapter", again):
        config: Any = PeftConfig.from_pretrained(str(adapter))
        method = method_of(config)
        ranked = method is not None and method.ranked
        largest = int(config.r) if ranked else None
    if ranked and rank is None:
        raise typer.BadParameter(f"missing. Pass the rank to write, up to {largest}.", param_hint="--rank")
    if not ranked and rank is not None:
        raise typer.BadParameter(
            f"{rank}: a {written['peft_type']} adapter has one rank. Leave the option out.", param_hint="--rank"
        )
    if rank is not None and largest is not None and rank > largest:
        raise typer.BadParameter(f"{rank} is above {largest}, the largest rank of {adapter}.", param_hint="--rank")
    base = model or config.base_model_name_or_path
    if not base:
        raise typer.BadParameter(f"{adapter} does not say its base model: pass --model.", param_hint="--model")
    kind = model_class(config, base)
    with blame(f"the base model {base!r} could not be loaded", "Pass --model with the one that was trained on."):
        loaded = kind.from_pretrained(base)
    with blame(f"{adapter} does not load on {base}", f"Its files are damaged, or it is of another base model. {again}"):
        loaded = PeftModel.from_pretrained(loaded, str(adapter))
    try:
        export_lora(loaded, out, rank=rank)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise typer.BadParameter(str(error), param_hint="OUT") from error
    except ValueError as error:
        raise UserError(f"{adapter} cannot be written as a LoRA: {error}") from error
    what = f"Rank {rank} of {adapter}" if rank else str(adapter)
    typer.echo(f"{what} is in {out}, as a stock LoRA adapter.")


def _check(adapter: Path, written: dict[str, Any]) -> None:
    """Raise for what shows without a model."""
    kind = written.get("peft_type")
    if kind == "LORA":
        raise typer.BadParameter(
            f"{adapter} is a stock LoRA adapter already. peft-dynamic resize writes another rank of it.",
            param_hint="ADAPTER",
        )
    method = method_of(written)
    if method is not None and not method.engines:
        raise typer.BadParameter(
            f"{adapter} is a {kind} adapter: {method.not_lora}, which no LoRA can express.",
            param_hint="ADAPTER",
        )
    weights = [adapter / "adapter_model.safetensors", adapter / "adapter_model.bin"]
    if not any(path.is_file() for path in weights):
        raise typer.BadParameter(f"{adapter} has no adapter_model.safetensors: pass a saved adapter.")
    if weights[0].is_file():
        from safetensors import safe_open

        with (
            blame(str(weights[0]), "The file is damaged: save the adapter again, or take another copy."),
            safe_open(weights[0], framework="pt") as tensors,
        ):
            list(tensors.keys())
