"""The loss of prepared rows from a Hugging Face model's own logits, one sequence at a time and equation by equation:
what every host trainer must agree with. Nothing of the library's loss is used, and of its prompts only their tokens."""

from __future__ import annotations

import torch

BETA, DELTA, ALPHA_PRED, ALPHA_CL = 0.2, 3.0, 0.5, 0.5


def nll(model, prompter, prompt, text):
    """Mean -log p of a target's tokens, from the model's own logits."""
    source, target = prompter.source_ids(*prompt), torch.tensor(prompter.target_ids(text))
    if prompter.is_encoder_decoder:
        start = torch.tensor([model.config.decoder_start_token_id])
        inputs = torch.cat([start, target[:-1]])[None]
        logits = model(input_ids=torch.tensor([source]), decoder_input_ids=inputs).logits[0]
    else:
        ids = torch.cat([torch.tensor(source), target])
        logits = model(input_ids=ids[None]).logits[0, len(source) - 1 : -1]
    return -logits.log_softmax(-1)[torch.arange(len(target)), target].mean()


def eager_loss(model, prompter, rows, N, delta=DELTA, labels=True, terms=None):
    """a1 L_pred + a2 L_cl (Eq. 8, 3, 6, 7; minmax) of some of an optimizer batch's N questions; weights of 1 where no
    score."""
    total = torch.zeros(())
    for row in rows:
        if labels:
            total = total + ALPHA_PRED * nll(model, prompter, ("predict: ", row["question"]), row["gold"]) / N
        for kind, sign in (("positives", 1), ("negatives", -1)):
            losses = [nll(model, prompter, ("explain: ", row["question"]), r["text"]) for r in row[kind]]
            if not losses:
                continue
            pick = (min if sign == 1 else max)(range(len(losses)), key=lambda j: float(losses[j].detach()))
            score = row[kind][pick].get("score")
            weight = 1.0 if score is None else score if sign == 1 else 1 - score
            if sign == 1:
                total = total + ALPHA_CL * weight * losses[pick] / N  # Eq. 6
            elif losses[pick] < delta:
                total = total - ALPHA_CL * BETA * weight * (losses[pick] - delta) / N  # Eq. 7
            if terms is not None:
                terms.append((kind, float(losses[pick].detach())))
    return total


def gradients(model, prompter, rows, N, **options):
    """(loss, {name: gradient}) of the model as it is; its own gradients are left alone."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = eager_loss(model, prompter, rows, N, **options)
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return loss.detach(), {
        n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), grads, strict=True)
    }


def relative_error(expected, actual):
    """Of gradients by name, as a share of the norm of all of them."""
    assert set(expected) == set(actual)
    norm = torch.stack([g.norm() for g in expected.values()]).norm()
    assert norm > 0
    return float(torch.stack([(expected[name] - actual[name]).norm() for name in expected]).norm() / norm)


def assert_same(expected, actual, tolerance=1e-10):
    """Gradients agree to `tolerance`, which is for float64."""
    error = relative_error(expected, actual)
    assert error <= tolerance, f"relative error {error:.2g}"


def assert_rounded_alike(truth, plain, actual):
    """Gradients are as far from float64 as those of another fp32 computation, give or take what adding up elsewise
    does."""
    error, usual = relative_error(truth, actual), relative_error(truth, plain)
    assert error <= 4 * usual + 8 * torch.finfo(torch.float32).eps, (
        f"relative error {error:.2g}, of plain torch {usual:.2g}"
    )
