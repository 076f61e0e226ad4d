"""Ask about smooth random images, once each, and learn from the stored answers: the cheap baseline of all others.

    x = clip(sigma u),   u ~ N(0, I) on a grid of 1/smooth of the size, enlarged;   L = T^2 KL(teacher(x) || student(x))

Where the teacher tells labels alone, the loss is the cross-entropy with them. Of simple images (digits) this teaches
most of what there is to learn, of photographs nothing.
"""

from pydantic import Field

from lfm.distill._contract import BlackBox, Inquirer, Inquiry, Taught, Terms
from lfm.distill._noise import smooth_noise
from lfm.distill.black_box._stored import Lesson, Stored, soft_or_hard
from lfm.method import Access, Needs


class NoisePool(BlackBox):
    needs = Needs(access=Access.LABELS, trains=True)
    paper = "https://arxiv.org/abs/1912.08987"

    temperature: float = Field(4.0, gt=0, description="Temperature of both models' probabilities in the loss.")
    smooth: list[int] = Field([1, 2, 3], min_length=1, description="Sizes of blobs in pixels, in equal parts; 1: none.")
    scale: float = Field(2.0, gt=0, description="Standard deviation, in that of the data as the teacher normalises it.")

    def inquirer(self, inquiry: Inquiry) -> Inquirer:
        return _NoisePool(self, inquiry)

    def terms(self, taught: Taught) -> Terms:
        return soft_or_hard(taught, self.temperature)


class _NoisePool(Stored):
    def __init__(self, method: NoisePool, inquiry: Inquiry) -> None:
        super().__init__(inquiry, inquiry.queries)
        self._method = method

    def lesson(self, step: int) -> Lesson:
        wanted = self.wanted(step)
        if wanted:
            self.ask(smooth_noise(wanted, self.inquiry.space, self._method.smooth, self._method.scale))
        return self.replay(self.inquiry.batch_size)
