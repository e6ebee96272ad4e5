"""A language model on a GLUE or SuperGLUE task: supervised with the task's label words, then PPO from there.

    python examples/ppo_glue.py --task sst2 --dataset_name nyu-mll/glue --dataset_config sst2 \
        --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --use_peft --lora_target_modules all-linear \
        --sft_steps 100 --per_device_train_batch_size 16 --max_steps 200 --num_ppo_epochs 2 --learning_rate 1e-4 \
        --max_completion_length 16 --output_dir out/ppo_glue

Or `accelerate launch examples/ppo_glue.py --config my.yaml`, with the same names in the YAML file. Your own rows:
`--train_file my.jsonl --eval_file other.jsonl`, with the columns of the task and `label`. The scores before, between
and after are printed and written to OUTPUT_DIR/scores.json, and the adapter is saved in OUTPUT_DIR. Needs
`pip install '.[trl,nlu]'` in a checkout.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from checking import check, check_model, read_rows, read_settings
from datasets import Dataset, load_dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config, get_quantization_config

from peft_dynamic.trainers import (
    PPOConfig,
    PPOTrainer,
    evaluate_nlu,
    nlu_prompt,
    nlu_reward,
    nlu_target,
    record_rows,
)


@dataclass
class NLUArguments:
    task: str = field(default="sst2", metadata={"help": "A task of `nlu_prompt`, e.g. sst2, rte, boolq."})
    dataset_name: str = field(default="nyu-mll/glue", metadata={"help": "A dataset of the Hub, without `train_file`."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration; None for the task's name."})
    eval_split: str = field(default="validation", metadata={"help": "mnli: validation_matched or _mismatched."})
    train_file: str | None = field(default=None, metadata={"help": "JSON lines to train on."})
    eval_file: str | None = field(default=None, metadata={"help": "JSON lines to evaluate on."})
    eval_rows: int = field(default=500, metadata={"help": "Evaluate on so many rows at most."})
    sft_steps: int = field(default=100, metadata={"help": "Supervised steps before PPO; 0 for none."})
    sft_learning_rate: float = field(default=5e-4, metadata={"help": "Learning rate of the supervised steps."})
    chain_of_thought: bool = field(default=False, metadata={"help": "Ask for an analysis before the answer."})
    chat: bool = field(default=False, metadata={"help": "Use the model's chat template."})


def read(parser: TrlParser, arguments: NLUArguments) -> tuple[list[Any], list[Any]]:
    """The rows to train and to evaluate on, each of which the task can read."""
    if (arguments.train_file is None) != (arguments.eval_file is None):
        parser.error("--train_file and --eval_file: pass both, or neither and a --dataset_name.")
    if arguments.train_file is not None:
        train = read_rows(parser, "--train_file", arguments.train_file, ("label",))
        evaluation = read_rows(parser, "--eval_file", arguments.eval_file, ("label",))[: arguments.eval_rows]
        files = {"--train_file": arguments.train_file, "--eval_file": arguments.eval_file}
    else:
        data = load_dataset(arguments.dataset_name, arguments.dataset_config or arguments.task)
        if arguments.eval_split not in data:
            parser.error(f"--eval_split {arguments.eval_split}: it must be one of {', '.join(data)}.")
        files = dict.fromkeys(("--dataset_name", "--eval_split"), arguments.dataset_name)
        split = data[arguments.eval_split]
        train, evaluation = list(data["train"]), list(split.select(range(min(arguments.eval_rows, len(split)))))
    if arguments.task == "record":
        train = [row for query in train for row in record_rows(query, seed=0)]
        evaluation = [row for query in evaluation for row in record_rows(query)]
    for (option, name), rows in zip(files.items(), (train, evaluation), strict=True):
        for row in rows:
            try:
                nlu_prompt(arguments.task, row)
                nlu_target(arguments.task, row)
            except ValueError as error:
                parser.error(f"{option} {name}: {error}")
    return train, evaluation


def main(
    arguments: NLUArguments, settings: PPOConfig, model_settings: ModelConfig, train: list[Any], evaluation: list[Any]
) -> None:
    state, form = PartialState(), {"chain_of_thought": arguments.chain_of_thought, "chat": arguments.chat}
    tokenizer = AutoTokenizer.from_pretrained(model_settings.model_name_or_path)
    scores: dict[str, dict[str, float]] = {}

    def base() -> Any:
        quantization = get_quantization_config(model_settings)
        placed = {} if quantization is None else {"device_map": {"": state.device}, "quantization_config": quantization}
        return AutoModelForCausalLM.from_pretrained(
            model_settings.model_name_or_path, dtype=model_settings.dtype, **placed
        )

    def evaluate(name: str, model: Any) -> None:
        if state.is_main_process:
            limit = None if arguments.chain_of_thought else settings.max_completion_length
            found = evaluate_nlu(model, tokenizer, arguments.task, evaluation, max_new_tokens=limit, **form)
            scores[name] = found
            print(f"{name}: " + ", ".join(f"{metric} {value:.3f}" for metric, value in found.items()), flush=True)
        state.wait_for_everyone()

    model, peft_config = base(), get_peft_config(model_settings)
    evaluate("before", model.to(state.device))
    prompts = [nlu_prompt(arguments.task, row, **form) for row in train]
    if arguments.sft_steps:
        targets = [nlu_target(arguments.task, row, **form) for row in train]
        supervised = SFTTrainer(
            model,
            SFTConfig(
                str(Path(settings.output_dir) / "sft"),
                max_steps=arguments.sft_steps,
                learning_rate=arguments.sft_learning_rate,
                per_device_train_batch_size=settings.per_device_train_batch_size,
                bf16=settings.bf16,
                use_cpu=settings.use_cpu,
                seed=settings.seed,
                save_strategy="no",
                report_to=settings.report_to,
            ),
            train_dataset=Dataset.from_dict({"prompt": prompts, "completion": targets}),
            processing_class=tokenizer,
            peft_config=peft_config,
        )
        supervised.train()
        supervised.save_model()
        state.wait_for_everyone()
        folder = supervised.args.output_dir
        del supervised
        if peft_config is None:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=model_settings.dtype)
        else:  # trained on from there, while a second copy of the adapter stays as the reference policy
            model = PeftModel.from_pretrained(base(), folder, is_trainable=True)
            model.load_adapter(folder, "sft")
            settings.ref_adapter_name, peft_config = "sft", None
        evaluate("sft", model.to(state.device))
    # What follows the closing tag has no part in the reward, and would drift
    settings.stop_strings = settings.stop_strings or ["</Judgement>"]
    trainer = PPOTrainer(
        model,
        nlu_reward(arguments.task, arguments.chain_of_thought),
        settings,
        Dataset.from_dict({"prompt": prompts, "label": [row["label"] for row in train]}),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    trainer.train()
    evaluate("ppo", trainer.accelerator.unwrap_model(trainer.model))
    trainer.save_model()
    if state.is_main_process:
        (Path(settings.output_dir) / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")


if __name__ == "__main__":
    parser = TrlParser((NLUArguments, PPOConfig, ModelConfig))
    arguments, settings, model_settings = read_settings(parser)
    try:
        nlu_reward(arguments.task)
    except ValueError as error:
        parser.error(f"--task {arguments.task}: {error}")
    check(parser, arguments.sft_steps >= 0, "--sft_steps", arguments.sft_steps, "at least 0; 0 is no supervised part")
    check(parser, arguments.sft_learning_rate > 0, "--sft_learning_rate", arguments.sft_learning_rate, "above 0")
    check(parser, arguments.eval_rows >= 1, "--eval_rows", arguments.eval_rows, "at least 1")
    check_model(parser, "--model_name_or_path", model_settings.model_name_or_path)
    main(arguments, settings, model_settings, *read(parser, arguments))
