"""TRL's SFTTrainer, a decoder-only student: python trl_sft.py HuggingFaceTB/SmolLM2-135M train.jsonl"""

import json
import sys

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer
from trl import SFTConfig, SFTTrainer

from qcrd_fast import RationaleCollator, attach


class RationaleSFTTrainer(SFTTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """SFTTrainer's own would ask the model for the metrics of a next-token loss; Trainer's takes the model's
        loss."""
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)


def train(model, tokenizer, rows, output_dir="out", **settings):
    args = SFTConfig(
        output_dir,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        logging_steps=1,
        **settings,
    )
    trainer = RationaleSFTTrainer(
        model=attach(model),
        args=args,
        data_collator=RationaleCollator(tokenizer, model),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    name, data = sys.argv[1:]
    with open(data, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    bf16 = torch.cuda.is_available()  # TRL's default, which a CPU refuses
    train(model, tokenizer, rows, max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=4, bf16=bf16)
