"""`peft-dynamic export`: one rank of a saved adapter, as a stock LoRA checkpoint."""

from pathlib import Path
from typing import Annotated

import typer


def export(
    adapter: Annotated[Path, typer.Argument(help="The folder of a saved adapter.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    rank: Annotated[int, typer.Option(help="The rank to write.", min=1)],
    model: Annotated[str | None, typer.Option(help="The base model, if it is not where the adapter says.")] = None,
) -> None:
    """Write one rank of an adapter as a stock LoRA checkpoint, for PEFT, vLLM or a converter."""
    if not (adapter / "adapter_config.json").is_file():
        raise typer.BadParameter(f"{adapter} has no adapter_config.json: pass a saved adapter.", param_hint="ADAPTER")
    from peft import PeftConfig, PeftModel

    import peft_dynamic  # noqa: F401  # registers the adapter types
    from peft_dynamic.export import export_lora

    from ._load import auto_class, without_hosts_warnings

    config = PeftConfig.from_pretrained(str(adapter))
    base = model or config.base_model_name_or_path
    if not base:
        raise typer.BadParameter(f"{adapter} does not say its base model: pass --model.", param_hint="--model")
    if rank > config.r:
        raise typer.BadParameter(f"{rank} is above {config.r}, the largest rank of {adapter}.", param_hint="--rank")
    with without_hosts_warnings():
        loaded = PeftModel.from_pretrained(auto_class(config.task_type).from_pretrained(base), str(adapter))
    try:
        export_lora(loaded, out, rank=rank)
    except FileExistsError as error:
        raise typer.BadParameter(str(error), param_hint="OUT") from error
    typer.echo(f"Rank {rank} of {adapter} is in {out}, as a stock LoRA adapter.")
