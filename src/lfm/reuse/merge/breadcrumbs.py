"""Keep the middle of each task vector: neither the few largest changes nor the many small ones.

For each tensor, with its changes tau_i = theta_i - theta_0 in the order of their size:

    1. drop the share `outliers` of the largest
    2. keep the share `density` that comes next; the rest becomes 0
    3. theta = theta_0 + scale * sum_i w_i tau_i

The largest changes are often artefacts of one task and the smallest noise. Shares are of all elements, rounded down;
elements as large as the smallest one dropped in 1 are dropped too, those as large as the smallest kept in 2 are kept.
"""

import torch
from pydantic import Field

from lfm.method import Needs
from lfm.reuse.merge._contract import Chunk, Merge, Scan, Scope
from lfm.reuse.merge._magnitude import smallest_kept


class Breadcrumbs(Merge):
    needs = Needs(sources=(1, None), base=True, same_architecture=True, same_tokenizer=True)
    paper = "https://arxiv.org/abs/2312.06795"

    density: float = Field(0.9, gt=0, le=1, description="Share of each tensor's changes that is kept.")
    outliers: float = Field(0.01, ge=0, lt=1, description="Share of the largest changes that is dropped (gamma).")
    scale: float = Field(0.3, description="How far to go along the sum of the task vectors.")

    @property
    def measures(self) -> Scope:
        return "tensor"

    def measure(self, scan: Scan, sources: int, size: int) -> list[tuple[float, float]]:
        """Return, for each source, the sizes from which changes are kept and from which they are dropped again."""
        top = int(self.outliers * size)
        last = min(size, top + int(self.density * size))
        most = smallest_kept(scan, sources, top) if top else [float("inf")] * sources
        return list(zip(smallest_kept(scan, sources, last), most, strict=True))

    def merge(self, chunk: Chunk, measured: list[tuple[float, float]]) -> torch.Tensor:
        change = torch.zeros_like(chunk.the_base)
        for delta, weight, (least, most) in zip(chunk.deltas(), chunk.weights, measured, strict=True):
            size = delta.float().abs()
            delta.masked_fill_((size < least) | (size >= most), 0.0)
            change += delta.mul_(self.scale * weight)
        return chunk.moved(change)
