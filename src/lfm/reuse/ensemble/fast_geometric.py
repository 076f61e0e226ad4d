"""Walk from a trained model along low loss, in short cycles of the learning rate, and average on the way.

    a(i) = (1 - 2 t) a_1 + 2 t a_2          for t <= 1/2
           (2 - 2 t) a_2 + (2 t - 1) a_1    for t > 1/2,    t = (mod(i - 1, c) + 1) / c,  cycles of c steps
    p = 1/M sum_j p(. | x; theta_j),   theta_j the weights where a = a_2, in the middle of each cycle

Good solutions are joined by paths of good ones, so a trained model need not go far, nor over a hill, to become another:
cycles may be much shorter than those of `snapshot`, of 2 to 4 epochs in the paper. Start from a model that is trained
already; it is no member itself. A run is half a cycle down and M - 1 whole ones. The members lie in the output as
ordinary checkpoints.
"""

from __future__ import annotations

import math

from pydantic import Field

from lfm.method import Access, Data, Needs
from lfm.reuse.ensemble._contract import Course, TrainedEnsemble


class FastGeometric(TrainedEnsemble):
    needs = Needs(access=Access.WEIGHTS, data=Data.LABELLED, trains=True)
    paper = "https://arxiv.org/abs/1802.10026"

    cycles: int = Field(5, ge=1, description="Cycles of the learning rate, each with a member at its lowest point.")
    lowest: float = Field(0.01, ge=0, le=1, description="Learning rate there (a_2), as a share of the peak (a_1).")

    @property
    def fewest(self) -> int:
        return 2 * self.cycles - 1

    def course(self, steps: int) -> Course:
        half = math.ceil(steps / (2 * self.cycles - 1))
        cycle = 2 * half

        def rate(step: int) -> float:
            t = (step % cycle + 1) / cycle
            if t <= 1 / 2:
                return (1 - 2 * t) + 2 * t * self.lowest
            return (2 - 2 * t) * self.lowest + (2 * t - 1)

        middles = tuple(half + cycle * number for number in range(self.cycles))
        return Course(middles[-1], rate, middles)
