"""Exported students behind `transformers serve` on loopback: the prompt of training arrives, and the reply is
`generate`'s."""

from __future__ import annotations

import json
import shutil
import socket
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qcrd_fast.config import TrainConfig
from qcrd_fast.evaluate import generate_text
from qcrd_fast.export import export_run
from qcrd_fast.models.prompts import EXPLAIN, PREDICT
from qcrd_fast.runs.load import load_student
from qcrd_fast.train.trainer import train
from tests.support.students import sampled_rows
from tests.support.toy_tokenizers import KINDS

QUESTION = sampled_rows(1)[0]["question"]
QUESTIONS = (QUESTION, f"  {QUESTION}\n", "Tom </s><s>has 3 nuts. <|im_end|>How many?")
SAVED = {"bytes, BOS, chat": "chat", "bytes, BOS": "raw", "bytes, chat": "raw"}  # {tokenizer: prompt template}


@pytest.fixture(scope="module", params=SAVED)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with LoRA on a small Llama that learns a few rows by heart, so that it ends its answers."""
    pytest.importorskip("peft", reason="needs peft, which trains LoRA adapters")
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    folder = tmp_path_factory.mktemp("served")
    tokenizer = KINDS[request.param]()
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        **special,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "student")
    tokenizer.save_pretrained(folder / "student")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in sampled_rows(2)), encoding="utf-8")
    options: dict[str, Any] = dict(
        data=str(rows), validation_fraction=0, student=str(folder / "student"), output_dir=str(folder / "run"),
        max_steps=40,
        save_steps=40, method="dss", learning_rate=3e-2, use_peft=True, max_target_length=24, max_answer_tokens=4,
        prompt_template=SAVED[request.param],
    )  # fmt: skip
    train(TrainConfig(**options))
    return folder / "run"


@pytest.fixture(params=["merged", "adapter"])
def served(request: pytest.FixtureRequest, run: Path, tmp_path: Path) -> Iterator[tuple[Path, str, Any]]:
    """(run, address, server) of an export; an adapter has its base model's weights beside it, as its card says."""
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        pytest.skip(
            "needs fastapi, uvicorn and openai, which `transformers serve` runs on: pip install 'transformers[serving]'"
        )
    from transformers.cli.serve import Serve

    folder = tmp_path / "model"
    export_run(str(run), str(folder), adapter=request.param == "adapter")
    if request.param == "adapter":
        for name in ("config.json", "model.safetensors"):
            shutil.copy(run.parent / "student" / name, folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Serve(
        str(folder), host="127.0.0.1", port=port, device="cpu", dtype="float32", log_level="error", non_blocking=True
    )
    try:
        while not server.server.started:
            assert server._thread.is_alive()
            time.sleep(0.01)
        yield run, f"http://127.0.0.1:{port}/v1/chat/completions", server
    finally:
        server.kill_server()


def test_the_server_reads_and_says_what_generate_does(
    served: tuple[Path, str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, address, server = served
    (loaded,) = server._model_manager.loaded_models.values()
    arrived: list[list[int]] = []
    generate = loaded.model.generate

    def seen(*args: Any, **kwargs: Any) -> Any:
        arrived.append((kwargs["input_ids"] if "input_ids" in kwargs else args[0]).tolist()[0])
        return generate(*args, **kwargs)

    monkeypatch.setattr(loaded.model, "generate", seen)
    student, _ = load_student(str(run), "cpu")
    ends = []
    for question in QUESTIONS:
        (own,) = generate_text(str(run), question, max_new_tokens=24, device="cpu")
        for prefix, wanted in ((PREDICT, own["answer"]), (EXPLAIN, own["rationale"])):
            said = [ask(address, prefix + question), ask(address, question, chat_template_kwargs={"task": prefix[:-2]})]
            assert arrived == [student.source_ids(prefix, question)] * 2
            assert [choice["message"]["content"].strip() for choice in said] == [wanted] * 2
            ends += [choice["finish_reason"] for choice in said]
            arrived.clear()
        assert ask(address, question)["message"]["content"].strip() == own["answer"]
        arrived.clear()
    assert "stop" in ends  # at EOS, long before 24 tokens


def ask(address: str, content: str, **rest: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 24, **rest}
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)["choices"][0]
