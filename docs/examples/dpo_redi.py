"""Other losses on `linear_logprob`: DPO (arXiv 2305.18290) and REDI (arXiv 2505.24850), for a decoder-only model.

python dpo_redi.py HuggingFaceTB/SmolLM2-135M train.jsonl
"""

import copy
import json
import sys

import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

from qcrd_fast import RationaleCollator, linear_logprob


def sequence_logprobs(model, batch):
    """(sum of log p [B] in nats, tokens [B]) of each sequence's target, without a logits tensor."""
    hidden = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    logprob = linear_logprob(hidden, model.lm_head.weight, batch["target"])  # [B, L], 0 where nothing is scored
    return logprob.sum(-1), (batch["target"] != -100).sum(-1)


def first_of_each(batch, positive):
    """{question: its first positive (or negative) sequence}."""
    found = {}
    for b, (q, p) in enumerate(zip(batch["question"].tolist(), batch["positive"].tolist(), strict=True)):
        if p == positive:
            found.setdefault(q, b)
    return found


def dpo_loss(model, reference, batch, beta=0.1):
    """Mean of -log sigmoid(beta * (how much more the model prefers the chosen rationale than the reference does))."""
    chosen, rejected = first_of_each(batch, True), first_of_each(batch, False)
    pairs = torch.tensor([(chosen[q], rejected[q]) for q in chosen if q in rejected])
    with torch.no_grad():
        reference_B, _ = sequence_logprobs(reference, batch)
    model_B, _ = sequence_logprobs(model, batch)
    ratio_P2 = (model_B - reference_B)[pairs]
    return -logsigmoid(beta * (ratio_P2[:, 0] - ratio_P2[:, 1])).mean()


def redi_loss(model, batch, alpha=0.8):
    """1/N sum over questions of the positives' mean nll minus alpha times the negatives', each nll a mean over
    tokens."""
    logprob_B, tokens_B = sequence_logprobs(model, batch)
    nll_B, question, positive = -logprob_B / tokens_B, batch["question"], batch["positive"]
    same_BB = (question[:, None] == question) & (positive[:, None] == positive)
    weight_B = torch.where(positive, 1.0, -alpha) / same_BB.sum(1)  # 1/m for a positive, -alpha/k for a negative
    return (weight_B * nll_B).sum() / batch["num_questions"]


def train(model, tokenizer, rows, steps=3, batch_size=4, loss="dpo", learning_rate=1e-3):
    collate = RationaleCollator(tokenizer, model, label="none")
    reference = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate)
    for step in range(steps):
        batch = collate(rows[step * batch_size : (step + 1) * batch_size])
        value = dpo_loss(model, reference, batch) if loss == "dpo" else redi_loss(model, batch)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: {loss} loss {value.item():.4f}")


if __name__ == "__main__":
    name, data = sys.argv[1:3]
    with open(data, encoding="utf-8") as file:
        rows = [row for row in map(json.loads, file) if row["positives"] and row["negatives"]]
    for loss in ("dpo", "redi"):
        train(AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name), rows, loss=loss)
