"""Accelerate: accelerate launch accelerate_loop.py google-t5/t5-small train.jsonl"""

import contextlib
import json
import sys
from itertools import islice

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from qcrd_fast import RationaleCollator, attach, score_then_train


def train(model, tokenizer, rows, steps=3, batch_size=2, accumulation=4, learning_rate=1e-3):
    accelerator = Accelerator(gradient_accumulation_steps=accumulation)
    loader = DataLoader(rows, batch_size, shuffle=True, collate_fn=RationaleCollator(tokenizer, model))
    attach(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    batches = iter(loader)
    for step in range(steps):
        micro_batches = list(islice(batches, accumulation))
        if not micro_batches:
            break
        mine = torch.tensor(sum(batch["num_questions"] for batch in micro_batches), device=accelerator.device)
        questions = accelerator.reduce(mine, "sum")  # N of the whole optimizer step, over all ranks
        total = torch.zeros((), device=accelerator.device)
        for i, batch in enumerate(micro_batches):
            last = i == len(micro_batches) - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(model):
                loss = score_then_train(model, batch, num_questions=questions).loss
                # backward divides by the accumulation, and ranks are averaged: both are undone, since N counts it all.
                accelerator.backward(loss * accumulation * accelerator.num_processes)
                total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        accelerator.print(f"step {step + 1}: loss {accelerator.reduce(total, 'sum').item():.4f}")


if __name__ == "__main__":
    name, data = sys.argv[1:]
    with open(data, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    train(AutoModelForSeq2SeqLM.from_pretrained(name), AutoTokenizer.from_pretrained(name), rows)
