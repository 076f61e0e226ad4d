"""A real server on a free port, asked by the openai client, by plain HTTP, and by our own endpoint handle."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openai
import pytest
import torch
import transformers as tf
from PIL import Image
from tests.nets import resnet
from torch import nn

from lfm.cli import main
from lfm.data import Rows
from lfm.method import Access
from lfm.models.encode import Encoder
from lfm.models.handle import Model
from lfm.models.local import LocalBackend, byte_tokenizer, load_model
from lfm.models.ref import ImageSpec, ModelRef
from lfm.models.text import Completion, Message, Sampling
from lfm.serve.run import Serving, bound, names_of, server_of
from lfm.serve.work import Worker, Writing

ROOT = Path(__file__).parents[2]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@contextlib.contextmanager
def served(models, **how):
    """A server of these models in a thread; yields its port."""
    serving = Serving(port=0, **how)
    server, close = server_of(models, serving)
    place = bound(serving.host, 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place]})
    thread.start()
    try:
        yield place.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(10)
        close()
        assert not thread.is_alive()


def writer(context=256):
    """A random language model over bytes."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=259,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=context,
        initializer_range=0.5,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
    )
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    config.vocab_size = len(tokenizer)
    module = tf.LlamaForCausalLM(config).eval()
    return Model(
        LocalBackend(module, tokenizer),
        Access.WEIGHTS,
        "causal-lm",
        Encoder("causal-lm", tokenizer, context=context),
        "w",
    )


def classifier():
    torch.manual_seed(0)
    module = resnet(8, 3).eval()
    encoder = Encoder("image-classification", None, ImageSpec(size=32), {"cat": 0, "dog": 1, "eel": 2})
    return Model(LocalBackend(module, None), Access.WEIGHTS, "image-classification", encoder, "c")


class Slow:
    """A backend that writes one piece after another until it is stopped."""

    offers = Access.LABELS

    def __init__(self, pieces=1000, pause=0.01):
        self.pieces, self.pause = pieces, pause
        self.began, self.stopped, self.written = threading.Event(), threading.Event(), 0
        self.batches = []

    def write(self, prompts, how, tell):
        self.batches.append(list(prompts))
        self.began.set()
        try:
            for _ in range(self.pieces):
                self.written += 1
                for index in range(len(prompts)):
                    tell(index, "é")
                time.sleep(self.pause)
        finally:
            self.stopped.set()
        return [Completion("é" * self.pieces, "length", (), 1, self.pieces) for _ in prompts]


def slow_model(backend):
    return Model(backend, Access.LABELS, "causal-lm", Encoder("causal-lm"), "slow")


def picture(seed, size=32, kind="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return pixels, out.getvalue()


@pytest.fixture(scope="module")
def models():
    return {"w": writer(), "c": classifier()}


@pytest.fixture(scope="module")
def port(models):
    with served(models) as port:
        yield port


@pytest.fixture(scope="module")
def client(port):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(port, path, content=None, headers=None, method=None):
    """Return (status, body) of a plain request."""
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    raw = content if isinstance(content, (bytes, type(None))) else json.dumps(content).encode()
    given = {"Content-Type": "application/json", **(headers or {})}
    link.request(method or ("GET" if raw is None else "POST"), path, raw, given)
    answer = link.getresponse()
    status, body = answer.status, answer.read()
    link.close()
    return status, json.loads(body)


# --- the openai client ----------------------------------------------------------------------------------------------


def test_models_are_listed_and_described(client):
    assert [model.id for model in client.models.list()] == ["w", "c"]
    told = client.models.retrieve("c").lfm
    assert told["task"] == "image-classification"
    assert told["classes"] == ["cat", "dog", "eel"]
    assert told["access"] == "weights"


def test_completions_are_those_of_the_handle(client, models):
    made = client.completions.create(model="w", prompt=["Once", "Twice upon"], max_tokens=12, temperature=0, logprobs=3)
    wanted = models["w"].write(["Once", "Twice upon"], Sampling(max_new_tokens=12, top_logprobs=3))
    assert [choice.text for choice in made.choices] == [completion.text for completion in wanted]
    for choice, completion in zip(made.choices, wanted, strict=True):
        assert choice.logprobs.tokens == [token.text for token in completion.tokens]
        assert choice.logprobs.token_logprobs == [token.logprob for token in completion.tokens]
        assert choice.logprobs.top_logprobs == [dict(token.top) for token in completion.tokens]
        assert choice.finish_reason == completion.finish
    assert made.usage.prompt_tokens == sum(completion.prompt_tokens for completion in wanted)
    assert made.usage.completion_tokens == 24


def test_chat_is_that_of_the_handle(client, models):
    turns = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    made = client.chat.completions.create(
        model="w", messages=turns, max_completion_tokens=8, temperature=0, logprobs=True, top_logprobs=2
    )
    messages = [Message(role="system", content="Be kind."), Message(role="user", content="Hi")]
    [wanted] = models["w"].write([messages], Sampling(max_new_tokens=8, top_logprobs=2))
    assert made.choices[0].message.content == wanted.text
    told = made.choices[0].logprobs.content
    assert [item.logprob for item in told] == [token.logprob for token in wanted.tokens]
    assert [[other.token for other in item.top_logprobs] for item in told] == [list(t.top) for t in wanted.tokens]


def test_a_conversation_without_a_limit_stays_within_the_context(client):
    made = client.chat.completions.create(model="w", messages=[{"role": "user", "content": "Hi"}], temperature=0)
    assert made.usage.total_tokens == 256
    assert made.choices[0].finish_reason == "length"


@pytest.mark.parametrize("kind", ["completions", "chat"])
def test_pieces_add_up_to_the_whole(client, kind):
    """Characters of several bytes come whole: the model writes random bytes."""
    how = {"model": "w", "max_tokens": 60, "seed": 3, "n": 2, "temperature": 1.0}
    create = client.completions.create if kind == "completions" else client.chat.completions.create
    how |= {"prompt": "é"} if kind == "completions" else {"messages": [{"role": "user", "content": "é"}]}
    how |= {"logprobs": 1} if kind == "completions" else {"logprobs": True}
    whole = create(**how)
    texts, ends, counts, probabilities = ["", ""], ["", ""], None, [None, None]
    for chunk in create(**how, stream=True, stream_options={"include_usage": True}):
        counts = chunk.usage or counts
        for choice in chunk.choices:
            texts[choice.index] += (choice.text if kind == "completions" else choice.delta.content) or ""
            ends[choice.index] = choice.finish_reason or ends[choice.index]
            if choice.logprobs:
                probabilities[choice.index] = choice.logprobs.model_dump()
    assert texts == [c.text if kind == "completions" else c.message.content for c in whole.choices]
    assert texts[0] != texts[1]
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert counts == whole.usage
    assert probabilities == [choice.logprobs.model_dump() for choice in whole.choices]


def test_a_seed_says_what_is_written_and_stop_texts_end_it(client):
    how = {"model": "w", "prompt": "a", "max_tokens": 30}
    first, again, other = (client.completions.create(**how, seed=seed).choices[0].text for seed in (1, 1, 2))
    assert first == again != other
    stop = first[10:12]
    cut = client.completions.create(**how, seed=1, stop=stop).choices[0]
    assert cut.text == first[: first.index(stop)]
    assert cut.finish_reason == "stop"


def test_errors_are_the_clients_own(client):
    for error, how in (
        (openai.NotFoundError, {"model": "x", "prompt": "a"}),
        (openai.BadRequestError, {"model": "c", "prompt": "a"}),
        (openai.BadRequestError, {"model": "w", "prompt": "a" * 300}),
        (openai.BadRequestError, {"model": "w", "prompt": "a" * 300, "stream": True}),
        (openai.BadRequestError, {"model": "w", "prompt": "a", "echo": True}),
        (openai.BadRequestError, {"model": "w", "prompt": [[1, 2]]}),
        (openai.BadRequestError, {"model": "w", "prompt": "a", "temperature": -1}),
        (openai.BadRequestError, {"model": "w", "prompt": "a", "presence_penalty": 1}),
        (openai.BadRequestError, {"model": "w", "prompt": "a", "n": 200}),
        (openai.BadRequestError, {"model": "w", "prompt": "a", "extra_body": {"nonsense": 1}}),
    ):
        with pytest.raises(error) as caught:
            client.completions.create(**how)
        assert caught.value.body["message"]
    assert "echo" in client_error(client, echo=True)
    assert "256" in client_error(client, prompt="a" * 300)


def client_error(client, **how):
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(**{"model": "w", "prompt": "a", **how})
    return caught.value.body["message"]


def test_what_asks_for_nothing_is_accepted(client):
    made = client.completions.create(
        model="w", prompt="a", max_tokens=2, frequency_penalty=0, logit_bias={}, user="u", best_of=1, suffix=None
    )
    assert made.choices


def test_labels_alone_give_no_log_probabilities(models):
    with served({name: model.restrict(Access.LABELS) for name, model in models.items()}) as port:
        status, told = ask(port, "/v1/completions", {"model": "w", "prompt": "a", "logprobs": 1})
        assert (status, told["error"]["code"]) == (403, "access")
        status, told = ask(port, "/predict", {"images": [base64.b64encode(picture(1)[1]).decode()]})
        assert status == 200
        assert "probabilities" not in told
        assert told["labels"][0] in told["classes"]


# --- plain requests -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "content", "status"),
    [
        ("/v1/completions", b'{"prompt": ', 400),
        ("/v1/completions", b"[]", 400),
        ("/v1/completions", b"\xff\xfe", 400),
        ("/v1/chat/completions", {"model": "w", "messages": []}, 400),
        ("/v1/chat/completions", {"model": "w", "messages": [{"role": "king", "content": "a"}]}, 400),
        (
            "/v1/chat/completions",
            {"model": "w", "messages": [{"role": "user", "content": "a"}], "top_logprobs": 2},
            400,
        ),
        ("/v1/nothing", {}, 404),
        ("/v1/models/nobody", None, 404),
        ("/predict", b"{", 400),
        ("/predict", {}, 400),
        ("/predict", {"texts": ["a"]}, 400),
        ("/predict", {"images": ["%%%"]}, 400),
        ("/predict", {"images": ["AAAA"]}, 400),
        ("/predict", {"model": "w", "texts": ["a"]}, 400),
    ],
)
def test_wrong_requests_are_told_in_one_shape(port, path, content, status):
    found, told = ask(port, path, content)
    assert found == status, told
    assert set(told["error"]) == {"message", "type", "param", "code"}
    assert told["error"]["message"]


def test_every_problem_of_a_request_is_told_at_once(port):
    _, told = ask(port, "/v1/completions", {"prompt": "a", "temperature": 9, "top_p": 0})
    assert "temperature" in told["error"]["message"]
    assert "top_p" in told["error"]["message"]


def test_a_wrong_method_and_a_form_for_text_are_refused(port):
    assert ask(port, "/v1/completions", method="GET")[0] == 405
    assert ask(port, "/v1/completions", b"prompt=a", {"Content-Type": "text/plain"})[0] == 400
    assert ask(port, "/predict", b"x", {"Content-Type": "text/plain"})[0] == 415


def test_health_answers(port):
    assert ask(port, "/health") == (200, {"status": "ok"})


def test_names_of_other_machines_are_refused(port):
    """A page in a browser that has its own name point here gets nothing."""
    assert ask(port, "/v1/models", headers={"Host": f"evil.example:{port}"})[0] == 403
    assert ask(port, "/v1/models", headers={"Host": f"localhost:{port}"})[0] == 200


def test_the_token_is_asked_for(models, monkeypatch):
    monkeypatch.setenv("TOKEN_OF_TEST", "s3cret")
    with served(models, token_env="TOKEN_OF_TEST") as port:
        base = f"http://127.0.0.1:{port}/v1"
        with openai.OpenAI(base_url=base, api_key="s3cret", max_retries=0) as client:
            assert len(client.models.list().data) == 2
        with (
            openai.OpenAI(base_url=base, api_key="wrong", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError) as caught,
        ):
            client.models.list()
        assert "s3cret" not in str(caught.value)
        assert ask(port, "/v1/models")[0] == 401
        assert ask(port, "/health")[0] == 200


def test_large_requests_are_refused(models):
    with served(models, most_bytes=2**20) as port:
        assert ask(port, "/v1/completions", {"prompt": "a" * 2**20})[0] == 413


# --- classifiers ----------------------------------------------------------------------------------------------------


def test_pictures_are_classified_as_by_the_handle(port, models):
    drawn = [picture(seed) for seed in range(3)]
    rows = Rows({"image": np.stack([pixels for pixels, _ in drawn])}, "pictures")
    wanted = models["c"].probs(models["c"].encoder.encode(rows, 1, labelled=False).batch(range(3)))
    status, told = ask(port, "/predict", {"images": [base64.b64encode(raw).decode() for _, raw in drawn]})
    assert status == 200, told
    assert told["probabilities"] == wanted.tolist()
    assert told["labels"] == [told["classes"][index] for index in wanted.argmax(-1)]
    parts = b"".join(
        b'--B\r\nContent-Disposition: form-data; name="file"; filename="%d.png"\r\n\r\n%s\r\n' % (index, raw)
        for index, (_, raw) in enumerate(drawn)
    )
    status, sent = ask(port, "/predict", parts + b"--B--\r\n", {"Content-Type": "multipart/form-data; boundary=B"})
    assert status == 200, sent
    assert sent == told


def test_texts_are_classified_or_refused_if_too_long():
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = tf.BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16, num_labels=2,
    )  # fmt: skip
    encoder = Encoder("text-classification", tokenizer, None, {"bad": 0, "good": 1}, context=16)
    module: nn.Module = tf.BertForSequenceClassification(config).eval()
    model = Model(LocalBackend(module, tokenizer), Access.WEIGHTS, "text-classification", encoder, "t")
    with served({"t": model}) as port:
        status, told = ask(port, "/predict", {"texts": ["fine", "so so"]})
        assert status == 200, told
        assert np.allclose(np.sum(told["probabilities"], 1), 1)
        assert ask(port, "/predict", {"texts": ["a" * 40]})[0] == 400
        assert ask(port, "/predict", {"texts": ["a" * 40], "length": 16})[0] == 200


def test_the_real_resnet_sees_what_it_sees_alone(assets):
    ref = ModelRef(
        ref=str(assets / "checkpoints/cifar10-resnet20"),
        module=f"{ROOT / 'tests/nets.py'}:resnet20",
        image=ImageSpec(size=32, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    )
    model = load_model(ref)
    with np.load(assets / "data/cifar10-jpeg.npz") as data:
        raw, offsets, labels = data["jpeg_test"], data["offsets_test"], data["y_test"]
    files = [raw[offsets[i] : offsets[i + 1]].tobytes() for i in range(40)]
    with served({"resnet": model}) as port:
        status, told = ask(port, "/predict", {"images": [base64.b64encode(file).decode() for file in files]})
    assert status == 200, told
    assert np.mean([int(label) == truth for label, truth in zip(told["labels"], labels[:40], strict=True)]) > 0.6


# --- many at once, and leaving --------------------------------------------------------------------------------------


def test_concurrent_requests_give_what_single_ones_give(client):
    prompts = [f"Tale {index}" for index in range(12)]

    def ask_one(prompt):
        return client.completions.create(model="w", prompt=prompt, max_tokens=16, seed=1).choices[0].text

    alone = [ask_one(prompt) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask_one, prompts)) == alone


def test_waiting_requests_are_written_together_and_equal_ones_apart():
    backend = Slow(pieces=3, pause=0.1)
    worker = Worker(slow_model(backend), together=3)
    first = Writing(prompts=["first"])
    worker.ask(first)
    assert backend.began.wait(5)
    others = [Writing(prompts=[text]) for text in ("a", "b", "a", "c", "d")]
    odd = Writing(prompts=["e"], how=Sampling(max_new_tokens=1))
    for job in (*others, odd):
        worker.ask(job)
    assert [len(job.future.result(10)) for job in (first, *others, odd)] == [1] * 7
    assert backend.batches == [["first"], ["a", "b", "c"], ["a", "d"], ["e"]]
    worker.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_its_generation(stream):
    backend = Slow()
    with served({"slow": slow_model(backend)}) as port:
        link = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        raw = json.dumps({"prompt": "a", "stream": stream})
        link.request("POST", "/v1/completions", raw, {"Content-Type": "application/json"})
        assert backend.began.wait(5)
        if stream:
            answer = link.getresponse()
            assert answer.readline().startswith(b"data: ")
            answer.close()
        link.close()
        assert backend.stopped.wait(5)
        assert backend.written < 900
        assert ask(port, "/health")[0] == 200


def test_a_bug_is_told_as_one_and_kept_inside(caplog):
    class Broken(Slow):
        def write(self, prompts, how, tell):
            raise ZeroDivisionError("secret")

    with served({"b": slow_model(Broken())}) as port:
        status, told = ask(port, "/v1/completions", {"prompt": "a"})
    assert status == 500
    assert "secret" not in json.dumps(told)
    assert "ZeroDivisionError" in caplog.text


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory, models):
    place = tmp_path_factory.mktemp("served") / "tiny"
    models["w"].module.save_pretrained(place)
    models["w"].encoder.tokenizer.save_pretrained(place)
    return place


def test_the_command_serves_and_stops(folder, tmp_path):
    code = "import sys; from lfm.cli import entry; entry()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "XDG_CACHE_HOME": str(tmp_path)}
    arguments = [sys.executable, "-c", code, "serve", str(folder), "--name", "mine", "--port", "0"]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as run:
        line = run.stderr.readline()
        assert line.startswith("serving mine (causal-lm, probs) at http://127.0.0.1:"), line + run.stderr.read()
        port = int(line.rpartition(":")[2].partition("/")[0])
        status, told = ask(port, "/v1/completions", {"prompt": "a", "max_tokens": 4, "temperature": 0})
        assert (status, told["model"]) == (200, "mine")
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=20)
    assert (run.returncode, out) == (130, "")
    assert "Traceback" not in err


def test_what_is_wrong_is_told_before_a_model_is_opened(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("NO_SUCH_TOKEN", raising=False)
    assert main(["serve"]) == 2
    assert main(["serve", "a", "x/a", "--host", "0.0.0.0", "--name", "one"]) == 2
    told = capsys.readouterr().err
    assert "--allow-open" in told
    assert "1 names for 2 models" in told
    assert main(["serve", "a", "--token-env", "NO_SUCH_TOKEN"]) == 2
    assert "NO_SUCH_TOKEN is not set" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "nowhere", "--port", str(taken.getsockname()[1])]) == 2
    told = capsys.readouterr().err
    assert "in use" in told
    assert "nowhere" not in told


def test_models_that_cannot_be_served_are_named(tmp_path, capsys):
    assert main(["serve", str(tmp_path / "nowhere"), "--port", "0"]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_a_missing_package_is_named(monkeypatch, capsys):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "fastapi" else real(name))
    assert main(["serve", "a"]) == 2
    assert "learn-from-model[serve]" in capsys.readouterr().err


def test_names_are_what_models_are_called(tmp_path):
    refs = [ModelRef(ref="org/name"), ModelRef(ref="http://host/v1#big"), ModelRef(ref=str(tmp_path))]
    assert names_of(refs, ()) == ["org/name", "big", tmp_path.name]
    with pytest.raises(ValueError, match="two models"):
        names_of([refs[0], refs[0]], ())


# --- there and back -------------------------------------------------------------------------------------------------


def test_our_own_endpoint_handle_gets_what_the_local_one_gives(port, models):
    """`lfm serve` behind a reference: the same texts and the same log-probabilities."""
    from lfm.models.open import open_model

    ref = ModelRef.model_validate({"ref": f"http://127.0.0.1:{port}/v1#w", "access": "probs"})
    handle = open_model(ref)
    how = Sampling(max_new_tokens=10, top_logprobs=2)
    for prompts in (["Once upon", "é"], [[Message(role="user", content="Hi")]]):
        for ours, theirs in zip(handle.write(prompts, how), models["w"].write(prompts, how), strict=True):
            assert ours.text == theirs.text
            assert ours.finish == theirs.finish
            assert [t.text for t in ours.tokens] == [t.text for t in theirs.tokens]
            assert np.allclose([t.logprob for t in ours.tokens], [t.logprob for t in theirs.tokens], atol=1e-5)


def test_the_real_model_tells_its_story(assets):
    model = load_model(ModelRef(ref=str(assets / "checkpoints/stories260k")))
    with (
        served({"stories": model}) as port,
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client,
    ):
        made = client.completions.create(model="stories", prompt="Once upon a time", max_tokens=24, temperature=0)
        assert made.choices[0].text.startswith(", there was a little girl named Lily.")
        with pytest.raises(openai.BadRequestError, match="chat template"):
            client.chat.completions.create(model="stories", messages=[{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize("access", ["labels", "probs"])
def test_our_own_endpoint_handle_classifies_as_the_local_one(port, models, access):
    from lfm.models.open import open_model

    handle = open_model(ModelRef.model_validate({"ref": f"http://127.0.0.1:{port}/v1#c", "access": access}))
    rows = Rows({"image": np.stack([picture(seed)[0] for seed in range(4)])}, "pictures")
    theirs, ours = (model.encoder.encode(rows, 1, labelled=False).batch(range(4)) for model in (handle, models["c"]))
    assert torch.equal(handle.labels(theirs), models["c"].labels(ours))
    if access == "probs":
        assert torch.allclose(handle.probs(theirs), models["c"].probs(ours), atol=1e-5)
