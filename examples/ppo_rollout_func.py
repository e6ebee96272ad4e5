"""PPO whose completions come from somewhere else: from vLLM where it can be imported, or from a plain `generate`.

    python examples/ppo_rollout_func.py --data prompts.jsonl --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
        --use_peft --lora_target_modules all-linear --per_device_train_batch_size 16 --max_steps 200 \
        --learning_rate 1e-4 --max_completion_length 32 --output_dir out/ppo_rollout_func

A row of the data has a `prompt`, and an `answer` that the completion has to contain. The same functions serve TRL's
GRPOTrainer as its `rollout_func`. Needs `pip install '.[trl]'` in a checkout, and for `--engine vllm` also vLLM.
"""

import importlib.util
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from checking import check, check_model, read_rows, read_settings
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, TrlParser, get_peft_config

from peft_dynamic.trainers import PPOConfig, PPOTrainer


@dataclass
class Arguments:
    data: str = field(metadata={"help": "JSON lines with the columns prompt and answer."})
    engine: str = field(default="auto", metadata={"help": "vllm, transformers, or auto: vLLM where it is installed."})


def with_transformers(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """A stand-in for an engine: `generate`, one prompt at a time, and its own log-probabilities."""
    tokenizer, settings = trainer.processing_class, trainer.args
    found: dict[str, Any] = {"prompt_ids": [], "completion_ids": [], "logprobs": []}
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").to(settings.device)
        # The policy is the whole softmax at one temperature: nothing may be cut off it
        sampling = {"do_sample": True, "temperature": settings.temperature, "top_k": 0, "top_p": 1.0}
        out = trainer.model.generate(
            **ids,
            **(sampling if trainer.do_sample else {"do_sample": False}),
            max_new_tokens=settings.max_completion_length,
            return_dict_in_generate=True,
            output_logits=True,
        )
        completion = out.sequences[0, ids["input_ids"].shape[1] :]
        logits = torch.cat(out.logits).float() / settings.temperature
        logprobs = logits.log_softmax(-1).gather(1, completion[:, None])[:, 0]
        found["prompt_ids"].append(ids["input_ids"][0].tolist())
        found["completion_ids"].append(completion.tolist())
        found["logprobs"].append(logprobs.tolist())
    return found


class WithVLLM:
    """vLLM in this process. It reads the adapter anew for each rollout, so it samples from the policy as it is."""

    def __init__(self, model: str, settings: PPOConfig, lora_rank: int) -> None:
        from vllm import LLM

        self.llm = LLM(
            model,
            enable_lora=True,
            max_lora_rank=lora_rank,
            gpu_memory_utilization=0.3,  # the rest is for training
            logprobs_mode="processed_logprobs",  # at the temperature, as the policy's are
            seed=settings.seed,
        )
        self.number = 0

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        settings, tokenizer = trainer.args, trainer.processing_class
        self.number += 1  # vLLM keeps an adapter by its number
        ids = tokenizer(prompts)["input_ids"]
        sampling = [
            SamplingParams(
                temperature=settings.temperature if trainer.do_sample else 0.0,
                max_tokens=settings.max_completion_length,
                logprobs=0,  # that of the sampled token alone
                seed=seed,
            )
            # of the rollout's own random state, so a resumed run draws the same; equal prompts get others
            for seed in torch.randint(2**31, (len(ids),)).tolist()
        ]
        with tempfile.TemporaryDirectory() as folder:
            trainer.model.save_pretrained(folder)
            outputs = self.llm.generate(
                [{"prompt_token_ids": each} for each in ids],
                sampling,
                lora_request=LoRARequest("policy", self.number, folder),
                use_tqdm=False,
            )
        done = [output.outputs[0] for output in outputs]
        return {
            "prompt_ids": ids,
            "completion_ids": [list(each.token_ids) for each in done],
            "logprobs": [
                [step[token].logprob for step, token in zip(each.logprobs, each.token_ids, strict=True)]
                for each in done
            ],
        }


def contains_the_answer(completions: list[str], answer: list[str], **others: Any) -> list[float]:
    return [float(wanted in said) for wanted, said in zip(answer, completions, strict=True)]


def main(engine: str, settings: PPOConfig, model_settings: ModelConfig, rows: list[Any]) -> None:
    name, adapter = model_settings.model_name_or_path, get_peft_config(model_settings)
    function = WithVLLM(name, settings, adapter.r) if engine == "vllm" else with_transformers
    trainer = PPOTrainer(
        AutoModelForCausalLM.from_pretrained(name, dtype=model_settings.dtype),
        contains_the_answer,
        settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(name),
        peft_config=adapter,
        rollout_func=function,
    )
    trainer.train()
    trainer.save_model()
    logged = [entry for entry in trainer.state.log_history if "reward" in entry]
    difference = max(entry["sampling/sampling_logp_difference/max"] for entry in logged)
    print(f"generated by {engine}: reward {logged[0]['reward']:.3f} to {logged[-1]['reward']:.3f}")
    print(f"log-probabilities of {engine} and of the policy differ by {difference:.1e} at most")
    print(f"saved in {Path(settings.output_dir)}")


if __name__ == "__main__":
    parser = TrlParser((Arguments, PPOConfig, ModelConfig))
    arguments, settings, model_settings = read_settings(parser)
    engine, installed = arguments.engine, importlib.util.find_spec("vllm") is not None
    check(parser, engine in ("auto", "vllm", "transformers"), "--engine", engine, "auto, vllm or transformers")
    if engine == "auto":
        engine = "vllm" if installed else "transformers"
    if engine == "vllm" and not installed:
        parser.error("--engine vllm: vLLM is not installed. Install it, or pass --engine transformers.")
    if engine == "vllm" and not model_settings.use_peft:
        parser.error("--engine vllm: it reads the policy as an adapter over the base model. Pass --use_peft.")
    check_model(parser, "--model_name_or_path", model_settings.model_name_or_path)
    rows = read_rows(parser, "--data", arguments.data, ("prompt", "answer"))
    main(engine, settings, model_settings, rows)
