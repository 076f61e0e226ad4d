"""Steal with a generator that seeks where teacher and student differ, and replay what was asked before (MAZE).

    L(x) = KL(teacher(x) || student(x))
    g(x) = (d / m) sum_j  [L(x + mu u_j) - L(x)] / mu  u_j,   u_j uniform on the unit sphere of the d pixels

The student minimises L, the generator maximises it through g, which is taken before its output is brought into the
range of pixels. A turn is one step of the generator, five of the student on new images, ten on stored ones, and asks
batch (m + 1 + 5) times. Unlike in the paper, the student takes AdamW with a cosine in place of SGD, and the generator
Adam: SGD with the paper's rate of 1e-4 hardly moves it within a few hundred turns. As for `dfme`, a teacher that takes
images of 8 bits needs a larger mu.
"""

import torch
from pydantic import Field

from lfm.distill._contract import Contested, Taught, Terms
from lfm.distill._losses import kl
from lfm.method import Access, Needs


class Maze(Contested):
    needs = Needs(access=Access.PROBS, trains=True)
    paper = "https://arxiv.org/abs/2005.03161"

    directions: int = Field(10, ge=1, description="Random directions for a gradient (m).")
    replay_steps: int = Field(10, ge=0, description="Steps of the student on stored images after those on new ones.")
    latent: int = Field(100, ge=1, description="Random numbers that an image is made from.")

    @property
    def replays(self) -> int:
        return self.replay_steps

    def gap(self, teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
        return kl(teacher.log_softmax(-1), student.log_softmax(-1))

    def terms(self, taught: Taught) -> Terms:
        return {"kl": self.gap(taught.teacher.logits, taught.student.logits).mean()}
