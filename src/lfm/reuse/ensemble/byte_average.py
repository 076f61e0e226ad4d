"""Average what language models of different tokenizers say of the next byte.

    p(byte | text) = sum_i w_i p_i(byte | text)
    p_i            = what model i gives to all tokenisations that spell the text and go on with the byte

A beam follows the tokenisations of most mass. Texts are written and scored byte by byte (`max_new_tokens` counts
bytes), which takes a pass of each model for nearly every byte; models of one tokenizer are averaged token by token by
`average`. Conversations are refused: the models share no chat template. Vieira et al. 2024; of prompts the last two
tokens alone may be cut otherwise, much as in Hayase et al. 2025.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lfm.method import Needs
from lfm.reuse.ensemble._contract import TextEnsemble

if TYPE_CHECKING:
    from lfm.models.handle import Backend, Model


class ByteAverage(TextEnsemble):
    needs = Needs(sources=(1, None))
    paper = "https://arxiv.org/abs/2412.03719"
    weighted = True

    of: Literal["probabilities", "logits"] = Field("probabilities", description="What is averaged.")
    hypotheses: int = Field(8, ge=1, description="Tokenisations of a text that each model follows at most.")
    floor: float = Field(1e-4, ge=0, lt=1, description="Drop those of less than this share of the best one's mass.")

    def backend(self, members: Sequence[Model], weights: Sequence[float]) -> Backend:
        from lfm.reuse.ensemble._bytes import ByteBackend, speller

        found = [speller(member, self.hypotheses, self.floor) for member in members]
        return ByteBackend(found, weights, self.of)
