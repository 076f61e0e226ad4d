"""Other people's endpoint: `transformers serve`, asked through our handle."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from tests.serve.test_serve import writer

from lfm.models.open import open_model
from lfm.models.ref import ModelRef
from lfm.models.text import Message, Sampling


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """`transformers serve` on a tiny random model; yields its folder, its port, and the model in this process."""
    absent = [name for name in ("fastapi", "uvicorn", "openai", "rich") if importlib.util.find_spec(name) is None]
    if absent:
        pytest.skip(f"transformers[serving] is not installed: no {', '.join(absent)}")
    model, place = writer(), tmp_path_factory.mktemp("theirs") / "tiny"
    model.module.save_pretrained(place)
    model.encoder.tokenizer.save_pretrained(place)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    code = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
    arguments = ["serve", str(place), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = place.parent / "log"
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(place.parent / "home")}
    with (
        log.open("w") as out,
        subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=out, stderr=out, env=offline) as run,
    ):
        try:
            _wait(run, port, log)
            yield place, port, model
        finally:
            run.kill()


def _wait(run, port, log, seconds=90):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, ConnectionError):
            assert run.poll() is None, log.read_text()
            time.sleep(0.1)
    raise AssertionError(f"did not start: {log.read_text()}")


@pytest.mark.parametrize("prompt", ["Once upon a time", [Message(role="user", content="Hi")]], ids=["text", "chat"])
def test_transformers_serve_answers_our_handle_as_the_model_in_memory(theirs, prompt):
    place, port, model = theirs
    handle = open_model(ModelRef.model_validate(f"http://127.0.0.1:{port}/v1#{place}"))
    how = Sampling(max_new_tokens=12)
    [made] = handle.write([prompt], how)
    [wanted] = model.write([prompt], how)
    assert made.text == wanted.text
    assert made.prompt_tokens == wanted.prompt_tokens
