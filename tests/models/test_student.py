"""The student's packed hidden states score exactly what the model itself would."""

import json
import shutil

import pytest
import torch

from qcrd_fast.errors import InputError
from qcrd_fast.models.prefix_packing import length_batches
from qcrd_fast.models.prompts import EXPLAIN, PromptSettings
from qcrd_fast.models.student import Student
from qcrd_fast.ops.linear_logprob import linear_logprob


@pytest.fixture(params=["t5_folder", "llama_folder"])
def student(request, float64):
    student = Student.load(str(request.getfixturevalue(request.param)), PromptSettings())
    student.model.eval()
    return student


QUESTIONS = ["Ann has 3 apples. Ann finds 4 apples, then loses 2 apples.", "Ben has 7 pens."]
RATIONALES = ["First 3 + 4 = 7 apples. Then 7 - 2 = 5.", "7", "Take away 2: 7 - 2 = 5."]
SOURCE_OF = [0, 1, 0]


def logprobs(student, sources, targets, source_of, **kwargs):
    packed = student.hidden(sources, targets, source_of, **kwargs)
    head = student.head
    out = linear_logprob(
        packed.hidden, head.weight, packed.target, bias=head.bias, scale=head.scale, softcap=head.softcap
    )
    return out, packed.segment


def test_scores_equal_the_models_own_loss(student):
    check_scores(student)


@pytest.mark.parametrize("kind", ["gemma2", "qwen2", "phi", "gpt2", "t5-untied"])
def test_heads_of_other_families_are_honoured(kind, llama_folder, tmp_path, float64):
    """Softcap (Gemma 2), a bias (Phi), no tie (Qwen 2, Phi), a T5 v1.1 that does not scale: after a save and a load
    too."""
    import transformers as tf

    tokenizer = tf.AutoTokenizer.from_pretrained(llama_folder)
    ids = dict(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, bos_token_id=1)
    small = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    t5 = dict(
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0, tie_word_embeddings=False
    )
    make = {
        "gemma2": lambda: tf.Gemma2ForCausalLM(
            tf.Gemma2Config(**ids, **small, head_dim=8, final_logit_softcapping=0.5)
        ),
        "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**ids, **small, tie_word_embeddings=False)),
        "phi": lambda: tf.PhiForCausalLM(tf.PhiConfig(**ids, **small)),
        "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**ids, n_embd=32, n_layer=2, n_head=4)),
        "t5-untied": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**ids, **t5)),
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make[kind]()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)  # biases and norms too
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    student = Student.load(str(tmp_path), PromptSettings())
    student.model.eval()
    head = student.head
    assert {"gemma2": head.softcap == 0.5, "phi": head.bias is not None, "t5-untied": head.scale == 1}.get(kind, True)
    check_scores(student)


def check_scores(student):
    sources = [student.source_ids(EXPLAIN, q) for q in QUESTIONS]
    targets = [student.target_ids(r) for r in RATIONALES]
    logprob, segment = logprobs(student, sources, targets, SOURCE_OF)
    for i, (target, q) in enumerate(zip(targets, SOURCE_OF, strict=True)):
        if student.is_encoder_decoder:
            loss = student.model(input_ids=torch.tensor([sources[q]]), labels=torch.tensor([target])).loss
        else:  # the prompt's tokens carry no loss
            ids = torch.tensor([sources[q] + target])
            labels = torch.tensor([[-100] * len(sources[q]) + target])
            loss = student.model(input_ids=ids, labels=labels).loss
        assert -logprob[segment == i].mean().item() == pytest.approx(loss.item(), abs=1e-10)


@pytest.mark.parametrize("max_tokens", [1, 40, 10_000])
def test_batching_by_length_changes_nothing(student, max_tokens):
    sources = [student.source_ids(EXPLAIN, q) for q in QUESTIONS]
    targets = [student.target_ids(r) for r in RATIONALES]
    expected = student.decode(student.encode(sources), targets, SOURCE_OF)
    got = student.hidden(sources, targets, SOURCE_OF, max_tokens=max_tokens)
    torch.testing.assert_close(got.hidden, expected.hidden, atol=1e-10, rtol=1e-10)
    assert got.target.tolist() == expected.target.tolist() and got.segment.tolist() == expected.segment.tolist()


def test_length_batches_are_a_partition_within_the_limit():
    lengths = [5, 80, 7, 7, 6, 300, 40, 41]
    batches = list(length_batches(lengths, 100))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[i] for i in batch)
        assert len(batch) == 1 or longest * len(batch) <= 100
        assert 2 * min(lengths[i] for i in batch) >= longest


def test_a_target_ends_in_eos_unless_it_was_cut(student):
    eos = student.tokenizer.eos_token_id
    assert student.target_ids("7 - 2 = 5")[-1] == eos
    student.prompts = PromptSettings(max_target_length=4)
    assert len(student.target_ids("7 - 2 = 5")) == 4 and eos not in student.target_ids("7 - 2 = 5")
    assert student.target_ids("7 - 2")[-1] == eos


def test_prompt_template_from_a_file(tmp_path, student):
    path = tmp_path / "template.txt"
    path.write_text("Ann {prompt} Ben")
    student.prompts = PromptSettings.from_option(str(path), 64, 64)
    text = student.text(student.source_ids(EXPLAIN, "7"))
    assert text.startswith("Ann explain: 7") and text.endswith("Ben")
    path.write_text("no place for it")
    with pytest.raises(InputError, match="does not contain"):
        PromptSettings.from_option(str(path), 64, 64)
    with pytest.raises(InputError, match="neither raw, chat, nor a file"):
        PromptSettings.from_option("nowhere.txt", 64, 64)


CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_system_prompt_stands_in_the_chat_template(tmp_path, llama_folder):
    student = Student.load(str(llama_folder), PromptSettings())
    student.tokenizer.chat_template = CHAT
    path = tmp_path / "system.txt"
    path.write_text("Ann has 3 coins.\n")
    for value in ("Ann has 3 coins.", str(path)):
        prompts = PromptSettings.from_option("chat", 64, 64, value)
        assert prompts.system == "Ann has 3 coins."
        chatting = Student(student.model, student.tokenizer, prompts)
        assert chatting.chat_text("predict: 7") == "<system>Ann has 3 coins.\n<user>predict: 7\n<assistant>"
        text = chatting.tokenizer.decode(chatting.source_ids(EXPLAIN, "7"))
        assert text.index("Ann has 3 coins") < text.index("explain: 7")
    with pytest.raises(InputError, match="--system-prompt needs --prompt-template chat"):
        PromptSettings.from_option("raw", 64, 64, "x")
    for template, why in (
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "it leaves it out"),
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
    ):
        student.tokenizer.chat_template = template
        with pytest.raises(InputError, match=f"takes no system message: .*{why}"):
            Student(student.model, student.tokenizer, prompts)


def test_wrong_students_are_refused_with_what_is_wrong(tmp_path, llama_folder):
    with pytest.raises(InputError, match="does not exist"):
        Student.load(str(tmp_path / "none"), PromptSettings())
    with pytest.raises(InputError, match=r"no config\.json"):
        Student.load(str(tmp_path), PromptSettings())
    small = tmp_path / "small"
    shutil.copytree(llama_folder, small)
    config = json.loads((small / "config.json").read_text())
    config["vocab_size"] += 8  # the weights no longer fit
    (small / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"of shape \(97, 32\), but in the weights it is \(89, 32\)"):
        Student.load(str(small), PromptSettings())
    with pytest.raises(InputError, match="no chat template"):
        Student.load(str(llama_folder), PromptSettings(template="chat"))


@pytest.mark.parametrize("name", ["./missing", "../missing", "/missing", "~/missing", "a/b/c", "x" * 5000])
def test_a_path_to_nothing_is_no_hub_id(name):
    with pytest.raises(InputError, match=r"does not exist" if len(name) < 99 else "cannot load"):
        Student.load(name, PromptSettings())


def test_a_decoder_needs_something_to_go_on_from(llama_folder, t5_folder):
    nothing = PromptSettings(template="{prompt}")
    with pytest.raises(InputError, match="has no token in the model's vocabulary"):
        Student.load(str(llama_folder), nothing).source_ids("", "  ")
    assert Student.load(str(t5_folder), nothing).source_ids("", "  ") == [1]  # an encoder reads the end of the sequence


def test_more_tokens_than_rows_is_refused(llama_folder):
    student = Student.load(str(llama_folder), PromptSettings())
    student.tokenizer.add_tokens(["a-new-word"])
    with pytest.raises(InputError, match=r"tokens but the model only"):
        Student(student.model, student.tokenizer, PromptSettings())


@pytest.mark.parametrize("folder", ["t5_folder", "llama_folder"])
def test_a_long_prompt_loses_its_beginning(folder, request):
    """The context goes first; the prefix and the question at the end stay."""
    student = Student.load(str(request.getfixturevalue(folder)), PromptSettings(max_source_length=20))
    asked = "Ann has 3 apples. How many are left?"
    with student.measuring() as lengths:
        long = student.text(student.source_ids(EXPLAIN, "Ben has 5 pens. " * 40 + asked))
        short = student.text(student.source_ids(EXPLAIN, asked))
    assert len(student.source_ids(EXPLAIN, "Ben has 5 pens. " * 40 + asked)) <= 22
    prefix, words = student.text(student.source_ids(EXPLAIN, "7")).split("7")[0].strip(), short.split()
    assert long.startswith(prefix) and long.split()[-6:] == words[-6:]
    assert lengths.prompts[0] > 20 >= lengths.prompts[1] and student._lengths is None
