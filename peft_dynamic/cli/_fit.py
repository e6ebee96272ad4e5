"""What the training verbs do once libraries are loaded: read the settings, build the trainer, train, save, say so.

Notable: there is no training loop here and no tokenisation. A verb's `Recipe` builds a trainer of TRL's or ours. What a
TRL script does around it is done here once for all of them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import typer
import yaml
from accelerate import PartialState
from transformers import EarlyStoppingCallback, TrainerCallback

import peft_dynamic.tuners  # noqa: F401  # registers the adapter types
from peft_dynamic.cli._before import (
    LAST,
    SAVED,
    check_curves,
    check_data,
    check_loggers,
    check_output,
    check_template,
    checkpoints,
    numbers,
)
from peft_dynamic.cli._edge import blame
from peft_dynamic.cli._given import bad_input, check_model, command_line
from peft_dynamic.cli._interrupt import Interrupted, Interruption
from peft_dynamic.cli._kind import check_kind
from peft_dynamic.hosts.quantization import unpack_bnb_4bit

MORE = (
    "--config takes a YAML file with these names as keys. --help-all --adapter dylora, or another, lists the adapter's "
    "own settings too."
)
SETTINGS = "run.yaml"
FILE = re.compile(r"\.(jsonl?|csv|tsv|parquet|arrow|txt)(\.(gz|bz2|xz))?$|^[.~/]", re.IGNORECASE)


@dataclass
class Given:
    """The settings of a run, read and checked."""

    script: Any
    training: Any
    model: Any
    peft_config: Any
    mixture: Any = None
    more: dict[str, Any] = field(default_factory=dict)  # from a recipe's `build` to its `after`


@dataclass
class Recipe:
    """How a verb trains.

    Attributes:
        config: the class of the trainer's settings.
        trainer: makes the trainer of the settings.
        script: the class of the script's arguments.
        mixture: TRL's DatasetMixtureConfig where the verb takes mixtures.
        task_type: the adapter's.
        defaults: settings that are others than the trainer's.
        after: called with the settings and the trainer once all is saved.
    """

    config: Any
    trainer: Callable[[Given], Any]
    script: Any
    mixture: Any = None
    task_type: str = "CAUSAL_LM"
    defaults: dict[str, Any] = field(default_factory=dict)
    after: Callable[[Given, Any], object] | None = None


def run(verb: str, recipe: Recipe, words: list[str]) -> None:
    """Train as the words say.

    Args:
        verb: its name.
        recipe: how it trains.
        words: what stands after it on the command line.
    """
    parser = _parser(verb, recipe)
    if "--help-all" in words:
        with _bad_options():
            typer.echo(parser.page(words))
        return
    if not sys.stderr.isatty():
        from datasets import disable_progress_bars

        disable_progress_bars()
    interruption = Interruption()
    with interruption.watched():
        given = None
        try:
            with _bad_options():
                given = _given(parser, recipe, words)
            check_kind(verb, recipe.task_type, given.model.model_name_or_path, model_settings(given))
            _train(recipe, given, parser.given, interruption)
        except Interrupted:
            if _is_main():
                typer.echo(f"Stopped. {_how_to_go_on(given)}", err=True)
            raise typer.Exit(128 + interruption.number) from None


def _parser(verb: str, recipe: Recipe) -> Any:
    from trl import ModelConfig

    from peft_dynamic.trainers.arguments import AdapterParser

    # A checkpoint every tenth, the last two kept: a run that breaks off can be gone on with
    defaults = {"save_steps": 0.1, "save_total_limit": 2, **recipe.defaults}

    class Parser(AdapterParser):
        def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
            found, rest = super().parse_known_args(args, namespace)
            if found.load_best_model_at_end and found.save_steps == defaults["save_steps"]:
                # the best checkpoint is one that was evaluated; transformers refuses other settings
                found.save_strategy, found.save_steps = found.eval_strategy, found.eval_steps or found.logging_steps
            return found, rest

    kinds = (recipe.script, recipe.config, ModelConfig, *([recipe.mixture] if recipe.mixture else []))
    parser = Parser(kinds, recipe.task_type, prog=f"peft-dynamic {verb}", add_help=False, epilog=MORE)
    known = {each.name for each in dataclasses.fields(recipe.config)}
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        defaults["bf16"] = False  # TRL's own default, which transformers refuses without an accelerator
    parser.set_defaults(**{name: value for name, value in defaults.items() if name in known})
    return parser


def _bad_options() -> Any:
    """What a parser or a configuration says of a value, as the command says it."""
    return bad_input("OPTIONS")


def _given(parser: Any, recipe: Recipe, words: list[str]) -> Given:
    script, training, model, *mixture, peft_config = parser.parse_args_and_config(words)
    given = Given(script, training, model, peft_config, mixture[0] if mixture else None)
    if not model.model_name_or_path:
        raise ValueError("--model_name_or_path is missing: name the base model, a folder or a name on the Hub.")
    model.model_name_or_path = check_model(model.model_name_or_path, "--model_name_or_path")
    if training.hub_token:  # Trainer pickles its settings into training_args.bin, which it pushes too
        os.environ["HF_TOKEN"], training.hub_token = training.hub_token, None
    if not sys.stderr.isatty() and "disable_tqdm" not in parser.given:
        training.disable_tqdm = True
    check_curves(script, training)
    check_output(script, training)
    check_data(parser.prog.split()[-1], given)
    check_loggers(training)
    return given


def model_settings(given: Given) -> dict[str, Any]:
    """What `from_pretrained` is given, as in TRL's scripts."""
    own = {
        "revision": given.model.model_revision,
        "attn_implementation": given.model.attn_implementation,
        "dtype": given.model.dtype,
    }
    if hasattr(given.training, "trust_remote_code"):
        own["trust_remote_code"] = given.training.trust_remote_code
    more = getattr(given.training, "model_init_kwargs", None)
    return own | (json.loads(more) if isinstance(more, str) else dict(more or {}))


def supervised(kind: Any) -> Callable[[Given], Any]:
    """What makes SFTTrainer, or a trainer that takes the same, of the settings."""

    def trainer(given: Given) -> Any:
        from trl import get_quantization_config

        train, evaluation = data(given)
        if given.training.assistant_only_loss and given.training.chat_template_path is None:
            check_template(tokenizer(given))
        given.training.model_init_kwargs = model_settings(given)
        return kind(
            given.model.model_name_or_path,
            args=given.training,
            train_dataset=train,
            eval_dataset=evaluation,
            quantization_config=get_quantization_config(given.model),
            peft_config=given.peft_config,
        )

    return trainer


def tokenizer(given: Given) -> Any:
    """The base model's tokenizer, with a token to pad with."""
    from transformers import AutoTokenizer

    name, settings = given.model.model_name_or_path, model_settings(given)
    kept = {key: settings[key] for key in ("revision", "trust_remote_code") if settings.get(key)}
    with blame(f"--model_name_or_path {name} has no tokenizer that loads", "Pass a model with one."):
        found = AutoTokenizer.from_pretrained(name, **kept)
    if found.pad_token is None:
        found.pad_token = found.eos_token
    return found


def data(given: Given, evaluated: bool | None = None) -> tuple[Any, Any]:
    """The rows to train on and, where there are evaluations, those to evaluate on.

    Args:
        given: the settings.
        evaluated: whether rows to evaluate on are wanted; None for what the settings say.

    Raises:
        typer.BadParameter: they cannot be had.
    """
    script, mixture = given.script, given.mixture
    if evaluated is None:
        evaluated = given.training.eval_strategy != "no"
    if mixture is not None and mixture.datasets:
        from trl import get_dataset

        with blame("datasets", "Check the names, subsets and splits of the mixture."):
            loaded = get_dataset(mixture)
    elif script.dataset_name:
        loaded = _loaded(script.dataset_name, "dataset_name", script)
    else:
        raise typer.BadParameter("missing: name the rows to train on.", param_hint="--dataset_name")
    train = _split(loaded, script.dataset_train_split, "dataset_train_split", script)
    if not evaluated:
        return train, None
    if script.eval_data is not None:
        loaded = _loaded(script.eval_data, "eval_data", script)
        names = [script.dataset_test_split, *(["validation"] if "validation" in loaded else []), *loaded]
        return train, loaded[next(name for name in names if name in loaded)]
    return train, _split(loaded, script.dataset_test_split, "dataset_test_split", script)


def _loaded(name: str, option: str, script: Any) -> Any:
    """A data set by splits: of a file its only one."""
    from datasets import Dataset, load_dataset

    from peft_dynamic.cli._read import BUILDERS, read_rows

    path = Path(name).expanduser()
    if path.is_file():
        if script.dataset_streaming:
            kind = BUILDERS.get(path.suffix, "csv" if path.suffix in (".csv", ".tsv") else "json")
            with blame(f"--{option} {name}", "Pass a file of JSON lines, CSV or Parquet."):
                return load_dataset(kind, data_files=str(path), streaming=True)
        return {"train": Dataset.from_list(read_rows(name, f"--{option}"))}
    if FILE.search(name) and not path.is_dir():
        raise typer.BadParameter(f"{name} is not a file. Pass one, a folder, or user/name.", param_hint=f"--{option}")
    fix = "Pass a file, a folder or the name of a data set on the Hub; --dataset_config names a subset."
    with blame(f"--{option} {name}", fix):
        return load_dataset(
            str(path) if path.is_dir() else name, script.dataset_config, streaming=script.dataset_streaming
        )


def _split(loaded: Any, name: str, option: str, script: Any) -> Any:
    if name not in loaded:
        fix = ", or pass --eval_data with the rows to evaluate on" if option == "dataset_test_split" else ""
        raise typer.BadParameter(
            f"{name}: the data have no such split; there are {', '.join(loaded)}. Pass one of these{fix}.",
            param_hint=f"--{option}",
        )
    return loaded[name]


class _Stop(TrainerCallback):
    """Ends the training after the step in which it was told to, in all processes at once, with a checkpoint."""

    def __init__(self, interruption: Interruption) -> None:
        self.interruption = interruption

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        told = torch.tensor(float(bool(self.interruption)), device=args.device)
        if args.world_size > 1:
            torch.distributed.all_reduce(told)
        if told:
            self.interruption.number = self.interruption.number or 2  # another process was told
            control.should_training_stop = control.should_save = True


def _callbacks(given: Given, trainer: Any, interruption: Interruption) -> None:
    from peft_dynamic.callbacks import ExitCurveCallback, RankCurveCallback

    script = given.script
    for kind, name in ((RankCurveCallback, "curve_ranks"), (ExitCurveCallback, "curve_exits")):
        if points := numbers(getattr(script, name), name):
            callback = kind(points, script.curve_every, given.more.get("evaluate"), trainer)
            with bad_input(f"--{name}"):
                callback.check(trainer.model)
            trainer.add_callback(callback)
    if script.early_stopping_patience is not None:  # after the curves, one of which it may go by
        trainer.add_callback(EarlyStoppingCallback(script.early_stopping_patience))
    trainer.add_callback(_Stop(interruption))


def _train(recipe: Recipe, given: Given, settings: dict[str, Any], interruption: Interruption) -> None:
    folder = Path(given.training.output_dir)
    with blame("the settings do not fit the model or the data", "Change what is named, then start again."):
        trainer = recipe.trainer(given)
    unpack_bnb_4bit(trainer.model)  # Trainer's own evaluations would leave some CPUs without gradients
    _callbacks(given, trainer, interruption)
    if _is_main():
        if given.script.overwrite:
            _clear(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_settings(folder / SETTINGS, settings)
    PartialState().wait_for_everyone()
    with interruption.gently():
        trainer.train(resume_from_checkpoint=given.training.resume_from_checkpoint)
    trainer.save_model(str(folder))
    if _is_main():
        if (folder / "adapter_config.json").is_file():
            from peft_dynamic.hub import write_model_card

            write_model_card(folder)
        typer.echo(f"Saved in {folder}.")
    if recipe.after is not None:
        recipe.after(given, trainer)
    if given.training.push_to_hub:
        with blame("--push_to_hub", "The run is saved all the same; push it again with peft-dynamic push."):
            trainer.push_to_hub(dataset_name=given.script.dataset_name)
    if hasattr(trainer, "end"):
        trainer.end()


def write_settings(path: Path, settings: dict[str, Any]) -> None:
    """The settings that were given, as a YAML file that starts the run again; no token is among them."""
    kept = {
        name: _plain(value)
        for name, value in sorted(settings.items())
        if not (name.endswith("_token") and name.startswith(("hub", "push")))
        and name not in ("overwrite", "config")
        and name != "resume_from_checkpoint"
    }
    path.write_text(yaml.safe_dump(kept, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {key: _plain(each) for key, each in dataclasses.asdict(value).items() if each is not None}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return value if isinstance(value, bool | int | float | str | type(None)) else str(value)


def _clear(folder: Path) -> None:
    """Remove another run's checkpoints and what it saved at the end, and nothing else."""
    for path in checkpoints(folder):
        shutil.rmtree(path)
    for pattern in SAVED[:3]:
        for path in folder.glob(pattern):
            path.unlink()
    for path in folder.glob("*.safetensors"):
        path.unlink()


def _is_main() -> bool:
    return bool(PartialState().is_main_process)


def _how_to_go_on(given: Given | None) -> str:
    """After an interruption: what is there, and the command that goes on."""
    found = checkpoints(Path(given.training.output_dir)) if given is not None else []
    again = command_line()
    if given is None or not found:
        return f"Nothing was saved yet. Start again with: {again}"
    step = found[-1].name.rpartition("-")[2]
    # Of an option that is given twice the last one counts, and it comes before the file's
    again += f"{' --overwrite false' if given.script.overwrite else ''} --resume_from_checkpoint {LAST}"
    return f"{found[-1].parent} has all up to step {step}. Go on with: {again}"
