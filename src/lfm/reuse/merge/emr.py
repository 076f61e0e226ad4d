"""Elect one task vector, large wherever any task's is; masks and a number per task turn it into each task's.

    1. elect:    s = sign(sum_i tau_i),  tau = s * max over the i with sign(tau_i) = s of |tau_i|
    2. mask:     M_i = 1 where sign(tau_i) = sign(tau), else 0
    3. rescale:  lambda_i = sum |tau_i| / sum |M_i tau|,  over the whole model
    4. theta = theta_0 + tau  (the unified model);  theta_i = theta_0 + lambda_i M_i tau  (`task: i`, counted from 0)

What the paper reports are the theta_i: one vector, and a bit per weight and task, stand for all models. The unified
model by itself overshoots, for it takes the largest change everywhere: to have one model for all tasks, `ties` or
`consensus` serve better. Where the sum in 1 is exactly 0 nothing is elected and the base's weight stays; the authors'
code elects the negative side there. For 3 that code adds up the means of the tensors, so that small tensors weigh as
much as large ones; here all elements weigh the same, as the paper's formula says.
"""

from collections.abc import Sequence

from pydantic import Field

from lfm.method import Needs
from lfm.reuse.merge._contract import Elementwise, Extent, Scope, Site
from lfm.reuse.merge._machine.array import Array, array, maximum, sign, total, where
from lfm.reuse.merge._task import task_objections


class Emr(Elementwise):
    needs = Needs(sources=(1, None), base=True, same_architecture=True, same_tokenizer=True)
    paper = "https://arxiv.org/abs/2405.17461"
    weighted = False

    task: int | None = Field(None, ge=0, description="Make the model of this source, counted from 0; all if left out.")

    def objections(self, weights: Sequence[float]) -> list[str]:
        return task_objections(self.task, len(weights))

    @property
    def measures(self) -> Scope:
        return "nothing" if self.task is None else "global"

    def measure(self, extent: Extent) -> float:
        """Return the rescaler of the task."""
        task = self.task or 0
        wanted, kept = extent.total(
            lambda site: [(abs(change), array(1.0)) for change in (site.deltas[task], _masked(site, task))]
        )
        return float(wanted / kept) if kept else 1.0

    def merge(self, site: Site, measured: float) -> Array:
        return site.moved(_unified(site) if self.task is None else _masked(site, self.task) * measured)


def _unified(site: Site) -> Array:
    elected = sign(total(site.deltas))
    largest = array(0.0)
    for delta in site.deltas:
        largest = maximum(largest, delta * elected)  # |delta| where its sign is the elected one
    return elected * largest


def _masked(site: Site, task: int) -> Array:
    unified = _unified(site)
    return where(sign(site.deltas[task]) * sign(unified) > 0, unified, 0.0)
