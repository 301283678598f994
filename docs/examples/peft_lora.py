"""LoRA by PEFT, in Hugging Face's Trainer: python peft_lora.py HuggingFaceTB/SmolLM2-135M train.jsonl"""

import json
import sys

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from qcrd_fast import RationaleCollator, attach


def train(model, tokenizer, rows, output_dir="out", lora=None, **settings):
    # the head is left out
    lora = lora or LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
    model = attach(get_peft_model(model, lora))
    args = TrainingArguments(output_dir, remove_unused_columns=False, logging_steps=1, **settings)
    trainer = Trainer(model, args, RationaleCollator(tokenizer, model), rows)
    trainer.train()
    return trainer


if __name__ == "__main__":
    name, data = sys.argv[1:]
    with open(data, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    train(model, tokenizer, rows, max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=4)
