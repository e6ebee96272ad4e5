#!/usr/bin/env bash
# The first hour with peft_dynamic, as a script: your own chats, one run, a look at its ranks, and a LoRA for elsewhere.
#
#     bash examples/first_hour.sh HuggingFaceTB/SmolLM2-135M-Instruct
#
# Install first, in a checkout: pip install '.[trl,plot]'. STEPS and OUT may be set: STEPS=20 OUT=try bash ...
set -euo pipefail
model=${1:?name a chat model: a folder, or a name on the Hub}
out=${OUT:-first-hour}
steps=${STEPS:-60}
mkdir -p "$out"

# 1. Your own chats, one a line. The assistant's turns are what is learnt.
cat > "$out/chats.jsonl" <<'ROWS'
{"messages": [{"role": "user", "content": "Opening hours?"}, {"role": "assistant", "content": "Nine to five."}]}
{"messages": [{"role": "user", "content": "Are you open on Sunday?"}, {"role": "assistant", "content": "No, on Sundays we rest."}]}
{"messages": [{"role": "user", "content": "Can I pay by card?"}, {"role": "assistant", "content": "Yes, by card or in cash."}]}
{"messages": [{"role": "user", "content": "Where are you?"}, {"role": "assistant", "content": "At the old harbour."}]}
ROWS

# 2. One run for every rank, with TRL's SFTTrainer. Each setting could stand in a YAML file: --config sft.yaml
peft-dynamic sft --model_name_or_path "$model" --dataset_name "$out/chats.jsonl" \
    --adapter dylora --r 8 --ranks 1,2,4,8 --target_modules all-linear \
    --learning_rate 1e-3 --max_steps "$steps" --per_device_train_batch_size 4 --gradient_checkpointing false \
    --output_dir "$out/run"

# 3. What did it learn, and at which rank?
peft-dynamic inspect "$out/run"
peft-dynamic measure "$out/run" --data "$out/chats.jsonl" --model "$model" --out "$out/curve.json"

# 4. The rank to keep, as a LoRA that needs nothing of ours
peft-dynamic export "$out/run" "$out/lora" --rank 2 --model "$model"

# 5. Elsewhere: PEFT alone
python - "$model" "$out/lora" <<'PYTHON'
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

name, adapter = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(name)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(name), adapter)
chat = [{"role": "user", "content": "Are you open on Sunday?"}]
tokens = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**tokens, max_new_tokens=20, do_sample=False)
print("rank 2 says:", tokenizer.decode(answer[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True))
assert "peft_dynamic" not in sys.modules
PYTHON
echo "All of it is in $out."
