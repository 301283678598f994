"""Distillation from a teacher's whole distribution with `linear_kl` (GKD, arXiv 2306.13649): two decoder-only models
with one tokenizer.

python gkd.py STUDENT train.jsonl TEACHER
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qcrd_fast import RationaleCollator, linear_kl


def hidden_of(model, batch):
    return model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state


def distillation_loss(student, teacher, batch, beta=0.5):
    """Mean divergence over the tokens of all candidates, in nats."""
    with torch.no_grad():
        teacher_hidden = hidden_of(teacher, batch)
    heads = (hidden_of(student, batch), student.lm_head.weight, teacher_hidden, teacher.lm_head.weight)
    divergence = linear_kl(*heads, batch["target"], beta=beta)  # [B, L], 0 where nothing is scored
    return divergence.sum() / (batch["target"] != -100).sum()


def main():
    name, data, teacher_name = sys.argv[1:]
    student, teacher = (AutoModelForCausalLM.from_pretrained(each) for each in (name, teacher_name))
    with open(data, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    collator = RationaleCollator(AutoTokenizer.from_pretrained(name), student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    for i in range(0, len(rows), 4):
        loss = distillation_loss(student, teacher.eval(), collator(rows[i : i + 4]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"{loss.item():.4f}")


if __name__ == "__main__":
    main()
