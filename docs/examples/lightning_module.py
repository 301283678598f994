"""Lightning: python lightning_module.py HuggingFaceTB/SmolLM2-135M train.jsonl"""

import json
import sys

import lightning
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from qcrd_fast import RationaleCollator, attach, score_then_train


class Distiller(lightning.LightningModule):
    def __init__(self, model, learning_rate=1e-3):
        super().__init__()
        self.model, self.learning_rate = attach(model.train()), learning_rate

    def training_step(self, batch, index):
        out = score_then_train(self.model, batch)
        self.log_dict(
            {"loss": out.loss, "loss_pred": out.loss_pred, "loss_cl": out.loss_cl}, batch_size=batch["num_questions"]
        )
        return out.loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), self.learning_rate)


def train(model, tokenizer, rows, steps=3, batch_size=2, accumulation=4, output_dir="out"):
    # Lightning divides by the accumulation and averages over ranks, so batches of one size make N right: drop_last.
    loader = DataLoader(rows, batch_size, shuffle=True, drop_last=True, collate_fn=RationaleCollator(tokenizer, model))
    trainer = lightning.Trainer(
        max_steps=steps,
        accumulate_grad_batches=accumulation,
        default_root_dir=output_dir,
        enable_checkpointing=False,
        logger=False,
    )
    trainer.fit(Distiller(model), loader)
    return trainer


if __name__ == "__main__":
    name, data = sys.argv[1:]
    with open(data, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    print(train(AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name), rows).callback_metrics)
