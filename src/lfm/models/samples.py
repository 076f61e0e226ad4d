"""Text that a language model makes up: a sample of what it was trained on, where nothing else is left of that."""

from __future__ import annotations

import torch

from lfm.errors import RequestError
from lfm.models.handle import Model


def sampled_tokens(
    model: Model, count: int, length: int, *, seed: int, temperature: float = 1.0, together: int = 64
) -> list[torch.Tensor]:
    """Return `count` texts as token ids (each of up to `length`), as likely as the model thinks; needs PROBS.

    Each begins with the token that begins texts, where there is one, or with one drawn from the whole vocabulary, and
    ends where the model ends it.
    """
    if length < 2:
        raise RequestError(f"a text of {length} token cannot be sampled; two or more can")
    generator = torch.Generator().manual_seed(seed)
    stepper, ends = model.stepper(), set(model.wording.ends)
    found: list[torch.Tensor] = []
    while len(found) < count:
        first = _first(model, min(together, count - len(found)), generator)
        said, texts = stepper.start([[token] for token in first]), [[token] for token in first]
        running = list(range(len(texts)))
        while running and len(texts[running[0]]) < length:
            weights = (said / temperature).softmax(-1).cpu()
            chosen = torch.multinomial(weights, 1, generator=generator)[:, 0]
            for place, token in zip(running, chosen.tolist(), strict=True):
                texts[place].append(token)
            going = [row for row, token in enumerate(chosen.tolist()) if token not in ends]
            running = [running[row] for row in going]
            if len(going) < len(chosen) and running:
                stepper.select(torch.tensor(going))
                chosen = chosen[going]
            if running and len(texts[running[0]]) < length:
                said = stepper.step(chosen.to(said.device))
        found += [torch.tensor(text) for text in texts]
    return found


def _first(model: Model, count: int, generator: torch.Generator) -> list[int]:
    tokenizer = model.encoder.tokenizer
    begin = getattr(tokenizer, "bos_token_id", None)
    begin = getattr(tokenizer, "eos_token_id", None) if begin is None else begin
    if begin is not None:
        return [int(begin)] * count
    chosen: list[int] = torch.randint(len(tokenizer), (count,), generator=generator).tolist()
    return chosen
