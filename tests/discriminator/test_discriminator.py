"""The discriminator: losses by hand, pooling and batching, what it learns, keyed randomness, exact resume."""

import copy
import math
import random
from collections import Counter

import pytest
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutput

from qcrd_fast.config import TrainConfig
from qcrd_fast.data.schema import Question, Rationale
from qcrd_fast.discriminator.corruption import BLANK, augment
from qcrd_fast.discriminator.encoders import SmallEncoder
from qcrd_fast.discriminator.model import Discriminator, build_discriminator
from qcrd_fast.discriminator.trainer import DiscriminatorTrainer, _corrupted, _example, _words, discriminator_loss
from qcrd_fast.errors import InputError, RunError

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "plus", "is", "how", "many"]


def make_tokenizer(**special):
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", BLANK, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special)


def make_llama():
    sizes = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    return LlamaForCausalLM(LlamaConfig(vocab_size=18, **sizes))


def make_t5(dropout=0.0):
    config = T5Config(
        vocab_size=18,
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=2,
        num_heads=2,
        dropout_rate=dropout,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def make_question(name, positives, negatives=()):
    positives, negatives = (
        tuple(Rationale(text=text, answer="1") for text in texts) for texts in (positives, negatives)
    )
    return Question(id=name, question="how many", positives=positives, negatives=negatives)


def count_questions(number, seed=0, num_positives=2):
    """Questions whose positives count upwards; nothing in their words tells them from a shuffled or corrupted text."""
    rng = random.Random(seed)
    texts = lambda: [" ".join(WORDS[s : s + 6]) for s in (rng.randrange(5) for _ in range(num_positives))]  # noqa: E731
    return [make_question(f"q{i}", texts()) for i in range(number)]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(pad_token="<pad>", eos_token="<eos>")


@pytest.fixture
def small(tokenizer):
    """A two-layer discriminator of width 32 with dropout, for training tests."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Discriminator(SmallEncoder(18, width=32, layers=2, heads=2), 32, tokenizer, 64).eval()


# ---- losses ----

SCORES = [0.9, 0.2, 0.6, 0.5, 0.7, 0.3, 0.8]
QUESTIONS = [2, 0, 2, 0, 1, 2, 4]  # any order; 1 has only a positive, 4 only a negative, 3 nothing
POSITIVE = [True, True, False, False, True, True, False]


def hand_loss(kind):
    e, log = math.exp, math.log
    if kind == "bce":
        return ((-log(0.2) - log(0.5)) / 2 + (-log(0.9) - log(0.3) - log(0.4)) / 3) / 2
    extra = (0, 0) if kind == "ratio" else (e(0.2), e(0.9) + e(0.3))
    zero = -log(e(0.2) / (e(0.5) + extra[0]))
    two = -log((e(0.9) + e(0.3)) / (e(0.6) + extra[1]))
    return (zero + two) / 2


@pytest.mark.parametrize("kind", ["ratio", "infonce", "bce"])
def test_loss_by_hand_and_gradient(kind):
    score = torch.tensor(SCORES, dtype=torch.float64, requires_grad=True)
    question, positive = torch.tensor(QUESTIONS), torch.tensor(POSITIVE)
    loss, count = discriminator_loss(score, question, positive, kind)
    assert loss.item() == pytest.approx(hand_loss(kind), abs=1e-12)
    assert count.item() == 2
    loss.backward()
    assert score.grad[[4, 6]].tolist() == [0, 0]  # questions that lack a class
    assert (score.grad[[0, 1, 5]] < 0).all() and (score.grad[[2, 3]] > 0).all()
    assert torch.autograd.gradcheck(lambda s: discriminator_loss(s, question, positive, kind)[0], score)


def test_a_shift_of_all_scores_is_nothing_to_eq_2():
    """It fixes differences of scores and not their level, by which Eq. 6 and 7 weigh (docs/method.md); bce fixes
    both."""
    score, question, positive = torch.tensor(SCORES).double(), torch.tensor(QUESTIONS), torch.tensor(POSITIVE)
    for kind, same in (("ratio", True), ("infonce", True), ("bce", False)):
        before, after = (discriminator_loss(score + shift, question, positive, kind)[0] for shift in (0.0, 0.05))
        assert torch.isclose(before, after, rtol=0, atol=1e-12) == same, kind


@pytest.mark.parametrize("kind", ["ratio", "infonce", "bce"])
@pytest.mark.parametrize("rationales", [0, 2])
def test_loss_without_a_question_to_count(kind, rationales):
    score = torch.full((rationales,), 0.5, requires_grad=True)
    loss, count = discriminator_loss(score, torch.arange(rationales), torch.arange(rationales) == 0, kind)
    loss.backward()
    assert loss.item() == 0 and count.item() == 0 and score.grad.tolist() == [0.0] * rationales


def test_bce_all_counts_questions_of_one_class_too():
    log = math.log
    score = torch.tensor(SCORES, dtype=torch.float64, requires_grad=True)
    loss, count = discriminator_loss(score, torch.tensor(QUESTIONS), torch.tensor(POSITIVE), "bce-all")
    alone = -log(0.7) - log(0.2)  # question 1 has a positive of 0.7, question 4 a negative of 0.8
    assert loss.item() == pytest.approx((2 * hand_loss("bce") + alone) / 4, abs=1e-12) and count.item() == 4
    loss.backward()
    assert (score.grad != 0).all()


def test_loss_refuses_bad_arguments():
    score = torch.rand(3)
    with pytest.raises(ValueError, match="ratio, infonce, bce, bce-all; got 'triplet'"):
        discriminator_loss(score, torch.arange(3), torch.ones(3), "triplet")
    with pytest.raises(ValueError, match="one shape"):
        discriminator_loss(score, torch.arange(2), torch.ones(3))


# ---- module ----


class Identity(nn.Module):
    """Token id t becomes the vector (t, -t)."""

    def forward(self, input_ids, attention_mask):
        return BaseModelOutput(last_hidden_state=torch.stack([input_ids, -input_ids], dim=-1).float())


def test_max_pooling_ignores_padding(tokenizer):
    discriminator = Discriminator(Identity(), 2, tokenizer)
    discriminator.head = nn.Linear(2, 1, bias=False)
    discriminator.head.weight.data = torch.tensor([[0.1, 0.01]])
    ids = torch.tensor([[3, 1, 2, 9, 0], [2, 5, 4, 4, 4]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    score = discriminator(ids, mask)
    assert score.dtype == torch.float32
    torch.testing.assert_close(score, torch.sigmoid(torch.tensor([0.3 - 0.01, 0.5 - 0.02])))


def test_encode_layout_and_truncation(small, tokenizer):
    small.max_length = 6
    ids = lambda text: tokenizer(text)["input_ids"]  # noqa: E731
    pairs = [
        ("how many", "one two"),
        ("how many is one", "two three four"),
        ("how many", "one two three four five six"),
        ("", ""),
    ]
    input_ids, mask = small.encode(pairs)
    assert input_ids.tolist() == [
        [*ids("how many"), 1, *ids("one two"), 0],
        [*ids("is one"), 1, *ids("two three four")],  # the question loses its left end
        [1, *ids("one two three four five")],  # then the rationale its right end
        [1, 0, 0, 0, 0, 0],
    ]
    assert mask.tolist() == [[1] * 5 + [0], [1] * 6, [1] * 6, [1] + [0] * 5]


@pytest.mark.parametrize("special", [{}, {"eos_token": "<eos>"}, {"sep_token": "<pad>", "eos_token": "<eos>"}])
def test_tokenizers_without_padding_or_separator(small, special):
    small.double()
    small.tokenizer = make_tokenizer(**special)
    pairs = [("how many", "one two three"), ("", "four"), ("", "")]
    together = small.score(pairs)
    assert torch.isfinite(together).all() and ((together > 0) & (together < 1)).all()
    torch.testing.assert_close(together, torch.cat([small.score([pair]) for pair in pairs]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ["small", "t5"])
def test_score_keeps_order_and_does_not_depend_on_batching(kind, small, tokenizer, float64):
    torch.manual_seed(0)
    discriminator = small.double() if kind == "small" else build_discriminator("auto", make_t5(dropout=0.5), tokenizer)
    rng = random.Random(0)
    text = lambda: " ".join(rng.choices(WORDS, k=rng.randrange(1, 20)))  # noqa: E731
    pairs = [(text(), text()) for _ in range(23)]
    discriminator.train()  # score switches to eval mode by itself, and back
    alone = torch.cat([discriminator.score([pair]) for pair in pairs])
    for max_tokens in (40, 10_000):
        scores = discriminator.score(pairs, max_tokens)
        torch.testing.assert_close(scores, alone, atol=1e-12, rtol=0)
        assert scores.dtype == torch.float64 and not scores.requires_grad
    assert discriminator.training and alone.std() > 0
    assert discriminator.score([]).shape == (0,)


# ---- building ----


def storages(module):
    return {tensor.untyped_storage().data_ptr() for tensor in module.state_dict().values()}


def test_auto_copies_the_encoder_of_t5(tokenizer):
    student = make_t5().to(torch.bfloat16)
    for module in student.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
    student.encoder.requires_grad_(False)
    discriminator = build_discriminator("auto", student, tokenizer)
    assert not storages(student) & storages(discriminator)
    theirs, ours = student.encoder.state_dict(), discriminator.encoder.state_dict()
    assert theirs.keys() == ours.keys() and "embed_tokens.weight" in ours
    assert all(torch.equal(theirs[name].float(), ours[name]) for name in ours)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in discriminator.parameters())
    assert not any(getattr(module, "gradient_checkpointing", False) for module in discriminator.modules())
    assert all(getattr(module, "gradient_checkpointing", True) for module in student.modules())
    assert discriminator.max_length == 512


def test_auto_makes_an_own_encoder_for_a_decoder_only_student(tokenizer, wide):
    torch.manual_seed(0)
    student = make_llama()
    state = torch.get_rng_state()
    discriminator = build_discriminator("auto", student, tokenizer, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(discriminator.encoder, SmallEncoder) and len(discriminator.encoder.layers.layers) == 4
    assert discriminator.encoder.embed.weight.shape == (18, 256) and discriminator.max_length == 512
    first, second = (layer.linear1.weight for layer in list(discriminator.encoder.layers.layers)[:2])
    assert not torch.equal(first, second)
    again, other = (build_discriminator("auto", student, tokenizer, seed=seed) for seed in (3, 4))
    assert torch.equal(again.head[0].weight, discriminator.head[0].weight)
    assert not torch.equal(other.head[0].weight, discriminator.head[0].weight)
    assert discriminator.score([("how many " * 600, "one two")]).shape == (1,)
    assert build_discriminator("none", student, tokenizer) is None


def test_named_encoders_load_from_safetensors_only(tmp_path, tokenizer):
    sizes = dict(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=24
    )
    bert = BertModel(BertConfig(vocab_size=18, **sizes))
    for folder, model in (("bert", bert), ("t5", make_t5())):
        model.save_pretrained(tmp_path / folder)
        make_tokenizer(pad_token="<pad>", sep_token="<eos>").save_pretrained(tmp_path / folder)
        discriminator = build_discriminator(str(tmp_path / folder), make_llama(), tokenizer)
        assert discriminator.tokenizer is not tokenizer
        assert discriminator.max_length == (24 if folder == "bert" else 512)
        assert not any("decoder" in name for name in discriminator.state_dict())
        assert discriminator.score([("how many " * 20, "one two")]).shape == (1,)
    (tmp_path / "bert" / "model.safetensors").unlink()
    torch.save(bert.state_dict(), tmp_path / "bert" / "pytorch_model.bin")
    with pytest.raises(InputError, match="--discriminator"):
        build_discriminator(str(tmp_path / "bert"), make_llama(), tokenizer)


# ---- augmentation ----


def test_augment_is_a_function_of_its_key():
    text = "Tom has 3.5 apples,\n and  eats 2 of them; so 1.5 are left."
    words = ["pears", "7", "gives"]
    made = [augment(text, (0, "q1", i), words) for i in range(50)]
    assert made == [augment(text, (0, "q1", i), words) for i in range(50)]
    assert made[::-1] == [augment(text, (0, "q1", i), words) for i in reversed(range(50))]
    assert text not in made and len(set(made)) > 30
    assert any(BLANK in m for m in made) and any(BLANK not in m and set(words) & set(m.split()) for m in made)
    assert all(m.count("\n and  ") or "\n" in m for m in made)  # layout is kept
    masked = augment(text, (0, "q1", 0), words, kinds=("mask",))
    assert 1 <= masked.count(BLANK) <= 8
    for text in ("", " ", "one", BLANK, "...", "pears"):  # nothing to replace, or nothing to replace it with
        assert all(augment(text, (1, "q", i), ["pears"]) != text for i in range(10))
    with pytest.raises(ValueError, match="mask, replace"):
        augment("one", (0,), words, kinds=("shuffle",))


def many(text, kind, count=40, **options):
    return {augment(text, (0, i), ["pear"], (kind,), **options) for i in range(count)}


def test_answer_swap_says_another_answer_wherever_it_stands():
    text = "There are 3 birds + 4 storks = 8 birds. 28 is not 8.5. So the answer is 8."
    made = many(text, "answer-swap", answer="8.0", others=["no"])  # as files write it
    swapped = ("3", "4", "6", "7", "9", "10", "18", "28", "8.5")  # near 8, or of the text
    expected = {text.replace("= 8 ", f"= {n} ").replace("is 8.", f"is {n}.") for n in swapped}
    assert len(made) > 4 and made <= expected  # 28 and 8.5 are left alone
    assert many("Yes, since it is yes.", "answer-swap", answer="yes", others=["yes", "no"]) == {"no, since it is no."}
    assert many("She walks 5 miles", "answer-swap", answer="12") <= {f"She walks {n} miles" for n in (3, 4, 6, 7, 15)}
    assert many("Nothing to swap", "answer-swap", answer="12", others=["3"]) == {f"Nothing to swap {BLANK}"}
    assert many("It is 1.5", "answer-swap", answer="1.5", others=["1.5", "2.5"]) == {"It is 2.5"}


def test_sentence_drop_leaves_the_others_whole():
    text = "First 3.5 + 1 = 4.5. Then 4.5 - 2 = 2.5!\nSo 2.5 are left."
    a, b, c = "First 3.5 + 1 = 4.5.", "Then 4.5 - 2 = 2.5!", "So 2.5 are left."
    assert many(text, "sentence-drop") == {f"{b}\n{c}", f"{a} {c}", f"{a} {b}"}
    assert many("Only one.", "sentence-drop") == {f"Only one. {BLANK}"}


def test_a_way_that_changes_nothing_gives_way_to_another():
    both = {augment("Only one 7.", (0, i), [], ("sentence-drop", "answer-swap"), answer="7") for i in range(20)}
    assert both <= {f"Only one {n}." for n in (5, 6, 8, 9, 17)}


def test_the_option_names_the_ways(small, monkeypatch):
    seen = []
    monkeypatch.setattr(DiscriminatorTrainer, "_step", lambda self, batch, when: seen.extend(batch) or 0.0)
    question = make_question("q", ["It is 7. Yes.", "One. It is 9."])
    trainer = make_trainer(small, discriminator_augment="answer-swap, sentence-drop")
    assert trainer.config.augmentations == ("answer-swap", "sentence-drop")
    trainer.pretrain([question], 20)
    assert all(len(e.negatives) == 2 and BLANK not in "".join(e.negatives) for e in seen) and len(seen) == 20
    seen.clear()
    assert make_trainer(small, discriminator_augment="none").pretrain([question], 5) is None and not seen
    with pytest.raises(InputError, match=r"--discriminator-augment .*got 'anser-swap'; did you mean 'answer-swap'"):
        TrainConfig(discriminator_augment="mask,anser-swap")


@pytest.mark.parametrize("positives, negatives", [(3, 0), (3, 1), (2, 2), (1, 3), (0, 2)])
def test_augmentation_balances(positives, negatives):
    question = make_question("q", [f"one two {i}" for i in range(positives)], [f"three {i}" for i in range(negatives)])
    extra = _corrupted(_example(question), (0, "q"), _words([question]), ("mask", "replace"), [])
    assert len(extra) == max(0, positives - negatives)
    assert all(text not in [p.text for p in question.positives] for text in extra)


# ---- training ----


def make_trainer(discriminator, **options):
    """The printed method's, unless `options` say otherwise."""
    return DiscriminatorTrainer(discriminator, TrainConfig(paper=True, discriminator_learning_rate=5e-3, **options))


def test_learns_to_tell_clean_from_corrupted(small):
    trainer = make_trainer(small, discriminator_batch_size=8)
    first = trainer.pretrain(count_questions(32), steps=4)
    trainer.pretrain(count_questions(32), steps=80)
    held_out = count_questions(20, seed=1)
    last = trainer.pretrain(held_out, steps=1)
    assert last < first - 0.3
    clean = [(q.question, p.text) for q in held_out for p in q.positives]
    corrupted = [(q, augment(text, (9, i), WORDS)) for i, (q, text) in enumerate(clean)]
    assert small.score(clean).mean() > small.score(corrupted).mean() + 0.5
    assert not small.training


def test_update_learns_the_lagged_negatives(small):
    questions = count_questions(16)
    rng = random.Random(0)
    lagged = {q.id: [" ".join(rng.sample(q.positives[0].text.split(), 6))] for q in questions}
    trainer = make_trainer(small, discriminator_batch_size=4)
    losses = [trainer.update(questions, lagged, iteration) for iteration in range(10)]
    assert losses[-1] < losses[0] - 0.3


def test_update_takes_questions_with_both_classes_alone(small, monkeypatch):
    both, bare = make_question("both", ["one"], ["two"]), make_question("bare", ["one"])
    empty = make_question("empty", [], ["two"])
    seen = []
    step = DiscriminatorTrainer._step
    monkeypatch.setattr(DiscriminatorTrainer, "_step", lambda self, b, w: seen.append(b) or step(self, b, w))
    trainer = make_trainer(small, discriminator_batch_size=1, discriminator_update_batches=3)
    before = copy.deepcopy(small.state_dict())
    assert trainer.update([bare, empty], {"empty": ["three"], "bare": []}, 0) is None
    assert trainer.pretrain([empty], 5) is None and trainer.pretrain([bare], 0) is None
    assert all(torch.equal(before[name], tensor) for name, tensor in small.state_dict().items()) and not seen
    trainer.update([both, bare, empty], {"bare": ["four"]}, 0)
    assert sorted((e.id, *e.positives, *e.negatives) for [e] in seen) == [
        ("bare", "one", "four"),
        ("both", "one", "two"),
    ]
    seen.clear()
    trainer.update([make_question(f"q{i}", ["one"], ["two"]) for i in range(5)], {}, 1)
    assert len(seen) == 3 and max(Counter(e.id for [e] in seen).values()) == 1


def test_alpha_multiplies_the_learning_rate(small):
    trainer = make_trainer(small, alpha_d=0.5)
    rates = lambda: [group["lr"] for group in trainer.optimizer.param_groups]  # noqa: E731
    assert rates() == [2.5e-3] and trainer.optimizer.param_groups[0]["weight_decay"] == 0.01
    trainer.set_alpha(0.45)
    assert rates() == [5e-3 * 0.45]


def test_non_finite_loss_names_step_and_questions(small):
    small.head[2].bias.data.fill_(float("nan"))
    before = copy.deepcopy(small.encoder.state_dict())
    with pytest.raises(RunError, match=r"iteration 7, step 0: loss nan.* questions only"):
        make_trainer(small).update([make_question("only", ["one"], ["two"])], {}, 7)
    assert all(torch.equal(before[name], tensor) for name, tensor in small.encoder.state_dict().items())


def test_training_neither_uses_nor_moves_the_global_generator(small):
    questions = count_questions(8)
    twin = copy.deepcopy(small)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    calls = []
    make_trainer(small).pretrain(questions, 3, on_step=calls.append)
    assert torch.equal(torch.get_rng_state(), state) and calls == [0, 1, 2]
    torch.manual_seed(2)
    make_trainer(twin).pretrain(questions, 3)
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), twin.parameters(), strict=True))


def test_state_round_trip_continues_bit_identically(small):
    questions = count_questions(12)
    lagged = {q.id: ["nine eight one"] for q in questions}
    fresh = copy.deepcopy(small)
    trainer = make_trainer(small, discriminator_batch_size=4)
    trainer.pretrain(questions, 3)
    trainer.set_alpha(0.3)
    trainer.update(questions, lagged, 0)
    optimizer_tensors, optimizer_json = trainer.optimizer_tensors()
    stored, stored_optimizer = save_safetensors(trainer.tensors()), save_safetensors(optimizer_tensors)
    expected = trainer.update(questions, lagged, 1)
    for parameter in fresh.parameters():
        parameter.data.add_(1)
    resumed = make_trainer(fresh, discriminator_batch_size=4)
    resumed.load(load_safetensors(stored), load_safetensors(stored_optimizer), optimizer_json)
    assert resumed.alpha_d == 0.3 and resumed.optimizer.param_groups[0]["lr"] == 5e-3 * 0.3
    assert resumed.update(questions, lagged, 1) == expected
    for (name, ours), theirs in zip(small.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_tied_weights_are_stored_once_and_stay_tied(small):
    small.encoder.tied = small.encoder.embed
    stored = load_safetensors(save_safetensors(small.tensors()))
    assert "encoder.embed.weight" in stored and "encoder.tied.weight" not in stored
    small.load_tensors({name: tensor + 1 for name, tensor in stored.items()})
    assert torch.equal(small.encoder.tied.weight, stored["encoder.embed.weight"] + 1)
    assert small.encoder.tied.weight is small.encoder.embed.weight


def test_loading_refuses_another_discriminator(small):
    tensors = small.tensors()
    weight = tensors.pop("head.0.weight")
    with pytest.raises(InputError, match=r"1 weights .* head.0.weight: expected \(32, 32\), got None"):
        small.load_tensors(tensors)
    with pytest.raises(InputError, match=r"got \(32, 31\)"):
        small.load_tensors({**tensors, "head.0.weight": weight[:, :31]})
    with pytest.raises(InputError, match="optimizer state has an unexpected nothing/exp_avg"):
        make_trainer(small).load(small.tensors(), {"nothing/exp_avg": weight}, {"alpha_d": 0.5})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu(small):
    pairs = [("how many", "one two three"), ("how many", "four")]
    expected = small.score(pairs)
    questions = count_questions(8)
    small.cuda()
    torch.testing.assert_close(small.score(pairs).cpu(), expected, atol=1e-4, rtol=0)
    state = torch.cuda.get_rng_state()
    trainer = make_trainer(small)
    trainer.pretrain(questions, 2)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    trainer.load(trainer.tensors(), *trainer.optimizer_tensors())
    assert math.isfinite(trainer.update(questions, {q.id: ["nine"] for q in questions}, 0))
