"""The sampler draws what the model's own logits say, whoever else is in the batch."""

from __future__ import annotations

import copy
import dataclasses
import gc
import math
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch

from qcrd_fast.generation import decoder as decoding
from qcrd_fast.generation import engine
from qcrd_fast.generation.engine import Cancelled, Sampler, SampleSettings
from qcrd_fast.generation.hf_generate import GenerateSampler
from qcrd_fast.generation.sample import make_sampler, sample
from qcrd_fast.models.prompts import EXPLAIN, PromptSettings
from qcrd_fast.models.student import Student
from qcrd_fast.ops import linear_sample
from qcrd_fast.ops.philox import gumbel, key_words
from tests.support.doubles import doubles

TEMPERATURE = 1.5


@pytest.fixture(params=["t5_folder", "llama_folder"])
def student(request):
    return Student.load(str(request.getfixturevalue(request.param)), PromptSettings())


@pytest.fixture(scope="module")
def tokenizer(llama_folder):
    return Student.load(str(llama_folder), PromptSettings()).tokenizer


def prompts(student, count=120):
    """Ragged ones, some of a single token, some twice."""
    texts = [f"Ann has {n % 8} apples." + " Ann finds 2 apples." * (n % 5) for n in range(count)]
    sources = [student.source_ids(EXPLAIN, text) for text in texts]
    return [source[:1] if n % 17 == 0 else source for n, source in enumerate(sources)]


def chi_square_limit(freedom: int) -> float:
    """The 99.9% quantile (Wilson and Hilferty)."""
    return freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.parametrize("top_k", [0, 50])
def test_draws_follow_the_softmax_of_the_models_logits(student, top_k):
    """20,000 questions with the same prompt, one token each, in a batch that is refilled."""
    count, source = 20_000, student.source_ids(EXPLAIN, "Ann has 3 apples.")
    settings = SampleSettings(TEMPERATURE, top_k, 1.0, max_new_tokens=1, batch_size=1024)
    drawn = sample(student, [source] * count, [key_words(0, str(i)) for i in range(count)], settings)
    student.model.eval()
    logits_V = decoding._own_logits(student, source, [])[0].double() / TEMPERATURE
    if top_k:
        assert top_k < len(logits_V)
        logits_V[logits_V < logits_V.topk(top_k).values[-1]] = -torch.inf
    expected_V = count * logits_V.softmax(0)
    observed_V = torch.bincount(torch.tensor(drawn).flatten(), minlength=len(logits_V)).double()
    assert observed_V[expected_V == 0].sum() == 0
    often = expected_V >= 5
    assert often.sum() >= 20
    chi2 = ((observed_V - expected_V)[often] ** 2 / expected_V[often]).sum().item()
    assert chi2 < chi_square_limit(int(often.sum()) - 1)


@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-12), (torch.bfloat16, 3e-2)])
def test_teacher_forced_logits_are_the_models(student, dtype, limit):
    """Every row at another position, prompts of other lengths."""
    sources = [student.source_ids(EXPLAIN, "Ben has 3 pens." * n) for n in (3, 1, 2)]
    sources[1] = sources[1][:1]
    generator = torch.Generator().manual_seed(1)
    replies = [torch.randint(2, len(student.tokenizer), (9,), generator=generator).tolist() for _ in sources]
    student.model.eval()
    exact = dtype == torch.float64
    if exact:
        student.model.double()
    with torch.no_grad(), doubles() if exact else torch.autocast("cpu", dtype):
        decoder = decoding.Decoder(student, len(sources), max(map(len, sources)), 10)
        got = decoding.teacher_forced(decoder, sources, replies)
        wanted = torch.stack([decoding._own_logits(student, s, r) for s, r in zip(sources, replies, strict=True)])
    assert got.shape == wanted.shape
    assert float((got - wanted).norm() / wanted.norm()) < limit


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("top_k", [0, 50])
def test_any_batch_and_order_draw_the_same(student, top_k):
    """More prompts than a batch holds; of the slowest, one at a time, the first 8."""
    sources = prompts(student, 70)
    keys = [key_words(1, str(i)) for i in range(len(sources))]
    natural, shuffled = list(range(70)), torch.randperm(70, generator=torch.Generator().manual_seed(0)).tolist()
    drawn = []
    for batch, order in ((64, natural), (64, shuffled), (20, shuffled), (1, natural[:8])):
        settings = SampleSettings(TEMPERATURE, top_k, 1.0, max_new_tokens=8, batch_size=batch)
        got = sample(student, [sources[i] for i in order], [keys[i] for i in order], settings, iteration=3)
        drawn.append([got[order.index(i)] for i in sorted(order)])
    assert all(other == drawn[0][: len(other)] for other in drawn) and len(drawn[2]) == 70
    assert len({len(tokens) for tokens in drawn[0]}) > 2  # rows ended at different times


@pytest.mark.usefixtures("float64")
def test_random_numbers_belong_to_the_question(student, monkeypatch):
    """Bitwise the same for any batch, order, and subset, as when a resume draws some again."""
    sources = prompts(student, 40)
    keys = [key_words(2, str(i)) for i in range(len(sources))]
    seen: dict[tuple, bytes] = {}

    def record(hidden, weight, key, counter, **options):
        for k, c, noise in zip(key.tolist(), counter.tolist(), gumbel(key, counter, size=9).numpy(), strict=True):
            assert seen.setdefault((*k, *c), noise.tobytes()) == noise.tobytes()
        return real(hidden, weight, key, counter, **options)

    real = linear_sample.linear_sample
    monkeypatch.setattr(engine, "linear_sample", record)
    settings = SampleSettings(TEMPERATURE, 0, 1.0, max_new_tokens=8, batch_size=40)
    drawn = sample(student, sources, keys, settings, iteration=5, indices=[i % 3 for i in range(40)])
    first = dict(seen)
    assert set(first) == {(*keys[i], position, i % 3, 5) for i in range(40) for position in range(len(drawn[i]))}
    some = list(range(39, 9, -3))
    settings = SampleSettings(TEMPERATURE, 0, 1.0, max_new_tokens=8, batch_size=4)
    again = sample(
        student,
        [sources[i] for i in some],
        [keys[i] for i in some],
        settings,
        iteration=5,
        indices=[i % 3 for i in some],
    )
    assert seen == first and again == [drawn[i] for i in some]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("static", [False, True])
def test_a_full_batch_is_refilled_and_samples_share_their_prompt(student, static, monkeypatch):
    """`static` is how a CUDA graph decodes: all rows always, several tokens between two looks at what has ended."""
    sources = [source for source in prompts(student, 20) for _ in range(3)]
    keys, indices = [key_words(3, str(i // 3)) for i in range(60)], [i % 3 for i in range(60)]
    settings = SampleSettings(TEMPERATURE, 50, 1.0, max_new_tokens=20, batch_size=8)
    wanted = sample(student, sources, keys, dataclasses.replace(settings, batch_size=60), indices=indices)
    drawn = make_sampler(student, settings, max(map(len, sources)), static=static)
    read, steps = [], []
    real_read, real_step = decoding.Decoder._read, Sampler._step
    monkeypatch.setattr(decoding.Decoder, "_read", lambda self, some: read.extend(some) or real_read(self, some))
    monkeypatch.setattr(
        Sampler, "_step", lambda self, active, *rest: steps.append(active) or real_step(self, active, *rest)
    )
    assert drawn.generate(sources, keys, indices) == wanted
    assert len(read) < 45  # a prompt is read again only where its samples came to different refills
    tokens = sum(map(len, wanted))
    assert drawn.drawn_tokens == tokens
    waste = 8 * engine.TOKENS_A_REPLAY if static else 1  # rows that wait for the refill, and the tail
    assert tokens <= sum(steps) < (2.2 if static else 1.6) * tokens + 20 * waste
    assert static == (set(steps) == {8})


@pytest.mark.usefixtures("float64")
def test_new_weights_in_the_same_place(student):
    """What a snapshot's loading does: the sampler keeps its buffers, T5's position bias included."""
    other = copy.copy(student)
    other.model = copy.deepcopy(student.model)
    sources = prompts(student, 20)
    keys = [key_words(4, str(i)) for i in range(20)]
    settings = SampleSettings(TEMPERATURE, 50, 1.0, max_new_tokens=10)
    kept = make_sampler(other, settings, max(map(len, sources)))
    before = kept.generate(sources, keys)
    addresses = [k.data_ptr() for k, _ in kept.decoder.cache.buffers]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter += 0.3 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    assert kept.generate(sources, keys) == sample(other, sources, keys, settings) != before
    assert addresses == [k.data_ptr() for k, _ in kept.decoder.cache.buffers]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("top_p, top_k", [(0.7, 0), (0.9, 20)])
def test_nucleus_sampling_is_that_of_generate(student, top_p, top_k):
    sources = prompts(student, 30)
    keys = [key_words(5, str(i)) for i in range(30)]
    settings = SampleSettings(0.4, top_k, top_p, max_new_tokens=10)
    assert sample(student, sources, keys, settings) == GenerateSampler(student, settings).generate(sources, keys)


@pytest.mark.parametrize("top_p", [1.0, 0.999])
def test_equal_logits_do_not_widen_the_top_k(student, top_p):
    drawn = make_sampler(student, SampleSettings(1.0, 3, top_p, batch_size=64), 4)
    key, counter = torch.arange(128).reshape(64, 2), torch.zeros(64, 3, dtype=torch.long)
    assert set(drawn._pick(torch.zeros(64, student.head.weight.shape[1]), key, counter).tolist()) == {0, 1, 2}


@pytest.mark.parametrize("kind", [make_sampler, GenerateSampler])
def test_a_draw_leaves_the_model_as_it_was(student, kind):
    student.model.train()
    frozen = student.model.get_input_embeddings().eval()
    modes, own_settings = [m.training for m in student.model.modules()], student.model.generation_config
    rest = (64,) if kind is make_sampler else ()
    kind(student, SampleSettings(max_new_tokens=3), *rest).generate(prompts(student, 3), [(0, 0)] * 3)
    assert not frozen.training and [m.training for m in student.model.modules()] == modes
    assert student.model.generation_config is own_settings
    assert not any("compute_bias" in module.__dict__ for module in student.model.modules())
    assert all(p.requires_grad for p in student.model.parameters()) and torch.is_grad_enabled()


@pytest.mark.usefixtures("float64")
def test_few_rows_where_memory_is_short(student, monkeypatch):
    sources = prompts(student, 10)
    keys, settings = [key_words(6, str(i)) for i in range(10)], SampleSettings(TEMPERATURE, max_new_tokens=6)
    wanted = sample(student, sources, keys, settings)
    monkeypatch.setattr(engine, "CACHE_BYTES", 60_000)
    few = make_sampler(student, settings, max(map(len, sources)))
    assert 1 <= few.rows < 10 and few.generate(sources, keys) == wanted
    assert sample(student, [], [], settings) == []


def test_a_draw_can_be_stopped(student):
    stop = threading.Event()
    stop.set()
    for kind in (make_sampler(student, SampleSettings(), 8), GenerateSampler(student, SampleSettings())):
        with pytest.raises(Cancelled):
            kind.generate([[2, 3]], [(0, 0)], stop=stop)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", ["gemma3", "mistral"])
def test_sliding_windows(kind, tokenizer):
    """Gemma 3 mixes layers with a window and without, Mistral has one for all; prompts and samples are longer than
    it."""
    from transformers import AutoModelForCausalLM, Gemma3TextConfig, MistralConfig

    shape = dict(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=12, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    config = MistralConfig(**shape) if kind == "mistral" else Gemma3TextConfig(**shape, layer_types=LAYERS)
    torch.manual_seed(0)
    student = Student(AutoModelForCausalLM.from_config(config).eval(), tokenizer, PromptSettings())
    sources, settings = prompts(student, 12), SampleSettings(TEMPERATURE, max_new_tokens=20, batch_size=5)
    keys = [key_words(7, str(i)) for i in range(12)]
    make_sampler(student, SampleSettings(max_new_tokens=2), 3)  # within the window any style will do
    drawn = make_sampler(student, settings, max(map(len, sources)))
    assert isinstance(drawn, Sampler) and drawn.decoder.style == ("tensor" if kind == "mistral" else "by type")
    assert drawn.generate(sources, keys) == GenerateSampler(student, settings).generate(sources, keys)


LAYERS = ["sliding_attention", "full_attention"]


def test_an_architecture_that_the_engine_cannot_run_goes_through_generate(tokenizer, caplog):
    """BART counts positions from the cache's length, which here is each row's own."""
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=len(tokenizer), d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, pad_token_id=0, eos_token_id=1,
        bos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    student = Student(BartForConditionalGeneration(config).eval(), tokenizer, PromptSettings())
    settings = SampleSettings(TEMPERATURE, max_new_tokens=4)
    for _ in range(2):
        drawn = sample(student, [[5, 6, 7], [8]], [(1, 2), (3, 4)], settings)
        assert all(0 < len(tokens) <= 4 for tokens in drawn)
    assert [r.name for r in caplog.records if "generate" in r.message] == ["qcrd_fast.generation.sample"]


@pytest.mark.usefixtures("float64")
def test_each_sample_has_a_limit_of_its_own(student):
    sources = prompts(student, 12)
    keys, limits = [key_words(8, str(i)) for i in range(12)], [1 + 2 * i for i in range(12)]
    settings = SampleSettings(TEMPERATURE, 50, 1.0, max_new_tokens=16, batch_size=5)
    drawn = make_sampler(student, settings, max(map(len, sources)))
    whole = drawn.generate(sources, keys)
    cut = [tokens[:n] for tokens, n in zip(whole, limits, strict=True)]
    assert drawn.generate(sources, keys, limits=limits) == cut
    assert GenerateSampler(student, settings).generate(sources, keys, limits=limits) == cut


def test_what_does_not_fit_is_named(student):
    drawn = make_sampler(student, SampleSettings(max_new_tokens=4), 3)
    for sources, limits, message in (
        ([[5, 6], [5] * 4], None, "prompt 1 has 4 tokens, expected 1 to 3"),
        ([[]], None, "prompt 0 has 0 tokens"),
        ([[5], [6]], [1, 0], "limits must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            drawn.generate(sources, [(0, 0)] * len(sources), limits=limits)
    assert drawn.generate([], []) == []
    with pytest.raises(ValueError, match="limits must be at least 1, got 0"):
        GenerateSampler(student, SampleSettings(max_new_tokens=4)).generate([[5]], [(0, 0)], limits=[0])


def test_a_body_that_no_graph_can_hold_is_run_without(student, monkeypatch, caplog):
    """As on a GPU where the capture fails: said once, and the same samples."""
    sources = prompts(student, 12)
    keys, settings = [key_words(9, str(i)) for i in range(12)], SampleSettings(TEMPERATURE, 50, 1.0, max_new_tokens=9)
    drawn = make_sampler(student, settings, max(map(len, sources)), static=True)
    wanted = drawn.generate(sources, keys)

    def fail(self, kv_length):
        self._step(self.rows, kv_length, self.decoder.prompt)  # what was run before it failed
        raise RuntimeError("operation not permitted when stream is capturing")

    ended = []
    monkeypatch.setattr(Sampler, "_capture", fail)
    monkeypatch.setattr(Sampler, "_end_capture", lambda self: ended.append(self))
    drawn.graphed = True
    drawn.warm_up()
    assert ended == [drawn]
    assert drawn.generate(sources, keys) == wanted == drawn.generate(sources, keys)
    assert sum("without CUDA graphs" in r.message for r in caplog.records) == 1


def test_capturing_in_the_middle_of_a_draw_disturbs_nothing(student, monkeypatch):
    """A span that was not warmed up is captured when it is needed; capturing runs steps."""
    sources = prompts(student, 12)
    keys, settings = [key_words(9, str(i)) for i in range(12)], SampleSettings(TEMPERATURE, 50, 1.0, 9, batch_size=4)
    drawn = make_sampler(student, settings, max(map(len, sources)), static=True)
    wanted = drawn.generate(sources, keys)

    class Replayed:
        def __init__(self, run):
            self.replay = run

    def capture(self, kv_length):
        def run():
            for _ in range(engine.TOKENS_A_REPLAY):
                self._step(self.rows, kv_length, self.decoder.prompt)

        run()
        return Replayed(run)

    monkeypatch.setattr(Sampler, "_capture", capture)
    monkeypatch.setattr(engine, "SPAN", 4)
    drawn.graphed = True
    assert drawn.generate(sources, keys) == wanted
    spans = set(drawn._graphs)
    assert len(spans) > 2
    drawn.use("torch")  # captured anew at once: the next draw may be beside training
    assert set(drawn._graphs) >= spans


def test_a_stream_of_a_green_context_is_one_while_the_lane_lives(monkeypatch):
    """torch destroys a green context with its last reference, and its streams with it."""
    from torch.cuda import green_contexts

    from qcrd_fast.train.overlap import SamplingWorker

    class Green:
        def Stream(self):
            return "stream"

    alive = weakref.WeakSet()

    def create(num_sms, device_id):
        made = Green()
        alive.add(made)
        return made

    monkeypatch.setattr(green_contexts.GreenContext, "create", create)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    worker = SamplingWorker("green-context", torch.device("cuda", 0))
    gc.collect()
    assert worker._stream == "stream" and len(alive) == 1
    worker.close()


@pytest.fixture
def on_gpu(student):
    moved = copy.copy(student)
    moved.model = copy.deepcopy(student.model).cuda()
    return moved


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_graphs_draw_what_eager_steps_draw(on_gpu, student):
    """In fp32, and as the CPU draws, but for ties."""
    sources = prompts(student)
    keys = [key_words(10, str(i)) for i in range(len(sources))]
    settings = SampleSettings(TEMPERATURE, 50, 1.0, max_new_tokens=16, batch_size=16)
    drawn = {}
    for static in (None, False):
        maker = make_sampler(on_gpu, settings, max(map(len, sources)), static=static)
        maker.warm_up()
        assert bool(maker._graphs) == (static is None)
        drawn[static] = maker.generate(sources, keys)
    cpu = sample(student, sources, keys, settings)
    for other in (drawn[False], cpu):
        assert sum(a == b for a, b in zip(drawn[None], other, strict=True)) >= 0.99 * len(sources)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("kind", ["serial", "stream", "priority", "green-context"])
def test_fifty_swaps_of_weights_take_no_memory(on_gpu, student, kind, tmp_path):
    """The graphs stay, and so does the memory; each swap changes what is said."""
    from qcrd_fast.config import TrainConfig
    from qcrd_fast.train.overlap import SamplingWorker, choose_overlap
    from qcrd_fast.train.snapshots import Snapshots

    device = torch.device("cuda")
    worker = SamplingWorker(choose_overlap(TrainConfig(overlap=kind), device), device)
    snapshots, sources = Snapshots(tmp_path, in_memory=2), prompts(student, 32)
    keys, settings = [key_words(11, str(i)) for i in range(32)], SampleSettings(TEMPERATURE, 50, 1.0, max_new_tokens=12)

    def make():
        made = make_sampler(on_gpu, settings, max(map(len, sources)))
        made.warm_up()
        return made

    maker = worker.run(make).result()
    snapshots.save(0, on_gpu.model)
    learner = copy.deepcopy(on_gpu.model)
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.mul_(1.5)
    snapshots.save(1, learner)
    said, held = [], []
    for swap in range(50):

        def draw(swap=swap):
            snapshots.load_into(swap % 2, on_gpu.model)
            return maker.generate(sources, keys)

        said.append(worker.run(draw).result())
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    worker.close()
    assert max(held[10:]) == min(held[10:])
    assert said[0] == said[48] and said[1] == said[49] and said[0] != said[1]
