"""`peft-dynamic ppo`: PPO on the rewards of functions, of reward models, or of a GLUE or SuperGLUE task."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import typer

from peft_dynamic.cli import _recipe

VERB = _recipe.Verb(
    "ppo",
    "Train a policy by PPO with an adapter. The reward is that of your own functions, of reward models, or of a task "
    "of GLUE and SuperGLUE.",
    (
        *(_recipe.MODEL, ("--dataset_name", "Rows with a `prompt`, or with the columns of --task, as for sft.")),
        *(("--reward_funcs", "Functions as module.function, with GRPOTrainer's arguments; several with blanks."),),
        *(("--reward_models", "Sequence classifiers with one label: folders or names on the Hub."),),
        *(("--task", "A task of GLUE or SuperGLUE, as sst2: its prompts and its reward."),),
        *(_recipe.ADAPTER, _recipe.OUTPUT, _recipe.CONFIG, _recipe.RATE, _recipe.STEPS),
    ),
    "--model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --dataset_name prompts.jsonl "
    "--reward_funcs my_rewards.short --adapter lora --r 8 --target_modules all-linear --output_dir out/ppo",
)


def ppo(context: typer.Context) -> None:
    """Train a policy by PPO on the rewards of functions or models; --config takes a YAML file.

    For example: peft-dynamic ppo --config ppo.yaml
    """
    VERB.run(context.args, _build)


def _build() -> Any:
    from peft_dynamic.cli import _fit
    from peft_dynamic.trainers.arguments import RunArguments
    from peft_dynamic.trainers.ppo import PPOConfig, PPOTrainer
    from peft_dynamic.trainers.rewards.nlu import nlu_prompt, nlu_reward

    @dataclass
    class PPOArguments(RunArguments):
        reward_funcs: list[str] | None = field(
            default=None, metadata={"help": "Functions as module.function, as GRPOTrainer takes them."}
        )
        reward_models: list[str] | None = field(
            default=None, metadata={"help": "Sequence classifiers with one label: folders or names on the Hub."}
        )
        task: str | None = field(
            default=None, metadata={"help": "A task of GLUE or SuperGLUE, as sst2: its prompts and its reward."}
        )
        chain_of_thought: bool = field(default=False, metadata={"help": "With task: ask for an analysis first."})

    def trainer(given: _fit.Given) -> Any:
        script = given.script
        rewards: list[Any] = [_function(name) for name in script.reward_funcs or []] + (script.reward_models or [])
        if script.task is not None:
            rewards.append(nlu_reward(script.task, script.chain_of_thought))
            given.training.stop_strings = given.training.stop_strings or ["</Judgement>"]
        if not rewards:
            raise typer.BadParameter(
                "missing. Pass --reward_funcs module.function, --reward_models, or --task.", param_hint="--reward_funcs"
            )
        train, evaluation = _fit.data(given)

        def prompts(rows: Any) -> Any:
            if rows is None or script.task is None:
                return rows
            return rows.map(lambda row: {"prompt": nlu_prompt(script.task, row, script.chain_of_thought)})

        return PPOTrainer(
            _policy(given),
            rewards,
            given.training,
            prompts(train),
            prompts(evaluation),
            processing_class=_fit.tokenizer(given),
            peft_config=given.peft_config,
        )

    return _fit.Recipe(PPOConfig, trainer, PPOArguments)


def _policy(given: Any) -> Any:
    from transformers import AutoModelForCausalLM, set_seed
    from trl import get_quantization_config

    from peft_dynamic.cli import _fit

    set_seed(given.training.seed)
    settings = _fit.model_settings(given) | {"quantization_config": get_quantization_config(given.model)}
    settings = {key: value for key, value in settings.items() if value is not None}
    given.training.model_init_kwargs = None  # the trainer is given the model itself
    return AutoModelForCausalLM.from_pretrained(given.model.model_name_or_path, **settings)


def _function(name: str) -> Any:
    """A reward function by its module and name; modules of the working directory are found too.

    Raises:
        typer.BadParameter: there is none.
    """
    import importlib
    import os
    import sys

    module, _, attribute = name.rpartition(".")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise typer.BadParameter(
            f"{name}: {error}. Write it as module.function; a file my_rewards.py here is the module my_rewards.",
            param_hint="--reward_funcs",
        ) from error
    if not callable(found):
        raise typer.BadParameter(f"{name} is a {type(found).__name__} and no function.", param_hint="--reward_funcs")
    return found
