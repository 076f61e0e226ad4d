"""Train one model on a learning rate that restarts, and average what it is at the end of each cycle.

    a(t) = a_0 / 2 (cos(pi mod(t - 1, T/M) / (T/M)) + 1),   t = 1 ... T,   M cycles
    p = 1/M sum_i p(. | x; theta_i),   theta_i the weights after i T/M steps

The learning rate falls to nearly 0 in each cycle, so that the model settles in a minimum, and jumps back to the top,
which throws it out again. M members cost as much as one model that is trained for as long; each has seen less than
that model, so cycles must be long enough to settle. The members lie in the output as ordinary checkpoints.
"""

from __future__ import annotations

import math

from pydantic import Field

from lfm.method import Access, Data, Needs
from lfm.reuse.ensemble._contract import Course, TrainedEnsemble


class Snapshot(TrainedEnsemble):
    needs = Needs(access=Access.WEIGHTS, data=Data.LABELLED, trains=True)
    paper = "https://arxiv.org/abs/1704.00109"

    cycles: int = Field(5, ge=1, description="Cycles of the learning rate, each of which ends in a member.")

    @property
    def fewest(self) -> int:
        return 2 * self.cycles  # with one step to a cycle the learning rate would never fall

    def course(self, steps: int) -> Course:
        cycle = math.ceil(steps / self.cycles)

        def rate(step: int) -> float:
            return (math.cos(math.pi * (step % cycle) / cycle) + 1) / 2

        ends = tuple(cycle * number for number in range(1, self.cycles + 1))
        return Course(ends[-1], rate, ends)
