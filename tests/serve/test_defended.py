"""What a server tells with `--round`, `--top-k` and `--perturb`."""

from __future__ import annotations

import json
import urllib.request

import numpy as np
import pytest
import torch
from tests.distill import digits
from tests.serve.test_serve import served

from lfm.cli import main
from lfm.errors import RequestError
from lfm.method import Access
from lfm.models._protocol import predict_body
from lfm.models.defence import Defence
from lfm.models.local import load_model
from lfm.models.open import open_model
from lfm.models.ref import ModelRef
from lfm.serve.run import Serving, opened

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 8), dtype=np.uint8)


def models(how: Serving) -> dict:
    ref = ModelRef.model_validate(digits.ref("teacher", digits.trained()))
    return opened({"digits": ref}, lambda ref: load_model(ref), how)


def asked(port: int) -> list[list[float]]:
    bodies = [predict_body("digits", image)[0]["images"][0] for image in IMAGES]
    content = json.dumps({"model": "digits", "images": bodies}).encode()
    head = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/predict", content, head)
    with urllib.request.urlopen(request) as answer:
        told = json.load(answer)
    assert [told["classes"][int(np.argmax(row))] for row in told["probabilities"]] == told["labels"]
    return told["probabilities"]


def test_clients_are_told_what_the_defence_leaves():
    with served(models(Serving())) as port:
        plain = asked(port)
    with served(models(Serving(defence=Defence(round=1, top_k=3)))) as port:
        told = asked(port)
        handle = open_model(ModelRef(ref=f"http://127.0.0.1:{port}/v1#digits", access="probs"))
        probs = handle.probs({"images": list(IMAGES)})
    assert np.argmax(told, 1).tolist() == np.argmax(plain, 1).tolist()
    assert all(value * 10 == pytest.approx(round(value * 10), abs=1e-5) for row in told for value in row)
    assert all(sum(value > 0 for value in row) <= 3 for row in told)
    assert torch.allclose(probs, torch.tensor(told), atol=1e-5)
    assert handle.encoder.image.size == 8


def test_noise_is_the_same_for_all_who_know_no_secret(monkeypatch):
    monkeypatch.setenv("LFM_TEST_SECRET", "not for everybody")
    found = []
    for secret_env in ("LFM_TEST_SECRET", "LFM_TEST_SECRET", None):
        with served(models(Serving(defence=Defence(perturb=0.4), secret_env=secret_env))) as port:
            found.append(asked(port))
            assert asked(port) == found[-1]
    assert found[0] == found[1] != found[2]
    assert np.argmax(found[0], 1).tolist() == np.argmax(found[2], 1).tolist()


def test_what_cannot_be_defended_is_told(monkeypatch, capsys):
    monkeypatch.delenv("NO_SUCH_SECRET", raising=False)
    for options, message in (
        (["--access", "labels", "--round", "2"], "clients get no probabilities"),
        (["--secret-env", "HOME"], "no noise to be keyed"),
        (["--perturb", "0.1", "--secret-env", "NO_SUCH_SECRET"], "NO_SUCH_SECRET is not set"),
        (["--perturb", "1"], "perturb"),
        (["--top-k", "0"], "top-k"),
    ):
        assert main(["serve", "nowhere", "--port", "0", *options]) == 2
        assert message in capsys.readouterr().err
    assert Serving(access=Access.LABELS).problems() == []


def test_noise_in_text_is_refused(tmp_path):
    from tests.serve.test_serve import writer

    with pytest.raises(RequestError, match="perturb is for classifiers"):
        opened({"w": ModelRef(ref="w")}, lambda ref: writer(), Serving(defence=Defence(perturb=0.1)))
