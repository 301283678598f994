"""Hugging Face's Trainer, with each term of the loss in the log: python hf_trainer.py google-t5/t5-small train.jsonl"""

import json
import sys

from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, Seq2SeqTrainer, Seq2SeqTrainingArguments

from qcrd_fast import RationaleCollator, attach, score_then_train


class RationaleTrainer(Seq2SeqTrainer):
    """Scores, selects and trains by hand, so that the terms of the loss can be logged; the plain Trainer needs none of
    it."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        out = score_then_train(model, inputs, num_questions=num_items_in_batch, iteration=int(self.state.epoch or 0))
        self.terms = {
            "loss_pred": out.loss_pred.item(),
            "loss_cl": out.loss_cl.item(),
            "active": out.active_R.sum().item(),
        }
        loss = out.loss
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # N counts the questions of all ranks, whose gradients are averaged
            loss = loss * self.accelerator.num_processes
        return (loss, out) if return_outputs else loss

    def log(self, logs, *args, **kwargs):
        super().log({**logs, **(getattr(self, "terms", {}) if "loss" in logs else {})}, *args, **kwargs)


def train(model, tokenizer, rows, output_dir="out", trainer_class=RationaleTrainer, **settings):
    args = Seq2SeqTrainingArguments(output_dir, remove_unused_columns=False, logging_steps=1, **settings)
    trainer = trainer_class(attach(model), args, RationaleCollator(tokenizer, model), rows)
    trainer.train()
    return trainer


if __name__ == "__main__":
    name, data = sys.argv[1:]
    with open(data, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    train(model, tokenizer, rows, max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=4)
