"""Keep only those changes of the summed task vector that matter to several tasks (Consensus Task Arithmetic).

With tau_i = theta_i - theta_0 and the multi-task vector tau = sum_i w_i tau_i:

    m_i = 1 where |tau_i| >= sparsity_i |tau - tau_i|, else 0          the TALL mask of task i
    theta = theta_0 + scale * tau  where at least `min_tasks` masks are 1, theta_0 elsewhere

A mask is 1 where a task's own weight is nearer to the multi-task one than a threshold, so that the merge keeps what the
task needs. Weights that no task needs ("catastrophic") or only one ("selfish") disturb the others: the default of 2
drops both, 1 drops the former only, and 0 is plain task arithmetic. The paper picks `sparsity` from 0.2 to 0.6 and
`scale` on validation data.

`task: i` rebuilds the model of source i (counted from 0) out of tau and its mask alone, theta_0 + m_i tau, to see how
well one multi-task vector and a bit per weight and task store all the models; `scale` and `min_tasks` are for merging
and say nothing then. Where both sides of the comparison are equal, the mask of the authors' code is 0, the paper's 1.
"""

from collections.abc import Sequence

from pydantic import Field

from lfm.method import Needs
from lfm.reuse.merge._combine import combine
from lfm.reuse.merge._contract import Elementwise, Site
from lfm.reuse.merge._machine.array import Array, total, where
from lfm.reuse.merge._task import task_objections


class Consensus(Elementwise):
    needs = Needs(sources=(2, None), base=True, same_architecture=True, same_tokenizer=True)
    paper = "https://arxiv.org/abs/2405.07813"
    per_source = ("sparsity",)

    sparsity: float = Field(0.4, ge=0, description="How strict the masks are (lambda of the paper): 0 masks nothing.")
    min_tasks: int = Field(2, ge=0, description="Number of tasks that a change has to matter to.")
    scale: float = Field(0.3, description="How far to go along what is left of the multi-task vector.")
    task: int | None = Field(None, ge=0, description="Rebuild the model of this source instead, counted from 0.")

    def objections(self, weights: Sequence[float]) -> list[str]:
        return task_objections(self.task, len(weights))

    def merge(self, site: Site, measured: None) -> Array:
        multitask = combine(site.deltas, site.weights)
        masks = [
            abs(delta) >= abs(multitask - delta) * sparsity
            for delta, sparsity in zip(site.deltas, site.each("sparsity"), strict=True)
        ]
        if self.task is not None:
            return site.moved(where(masks[self.task], multitask, 0.0))
        return site.moved(where(total(masks) >= self.min_tasks, multitask * self.scale, 0.0))
