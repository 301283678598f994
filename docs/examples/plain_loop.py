"""A loop of one's own: python plain_loop.py google-t5/t5-small train.jsonl"""

import json
import sys
from itertools import islice

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from qcrd_fast import RationaleCollator, attach, score_then_train


def train(model, tokenizer, rows, steps=3, batch_size=2, accumulation=4, learning_rate=1e-3):
    attach(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate)
    loader = DataLoader(rows, batch_size, shuffle=True, collate_fn=RationaleCollator(tokenizer, model))
    batches = iter(loader)
    for step in range(steps):
        micro_batches = list(islice(batches, accumulation))
        if not micro_batches:
            break
        questions = sum(batch["num_questions"] for batch in micro_batches)  # N of the whole optimizer step
        loss = 0.0
        for batch in micro_batches:
            out = score_then_train(model, batch, num_questions=questions)
            out.loss.backward()
            loss += out.loss.item()  # the shares add up: no division by the number of micro-batches
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss:.4f}")


if __name__ == "__main__":
    name, data = sys.argv[1:]
    with open(data, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    train(AutoModelForSeq2SeqLM.from_pretrained(name), AutoTokenizer.from_pretrained(name), rows)
