"""NCE: how much of the labels is left open by the model's answers, as negative conditional entropy.

    NCE = -H(Y | Z) = 1/n sum_i log P(y_i | z_i),   P(y | z) counted on the sample

Tran, Nguyen and Hassner 2019, https://arxiv.org/abs/1908.08142. It takes hard labels z alone.
"""

import numpy as np
from numpy.typing import NDArray


def nce(answers: NDArray[np.integer], labels: NDArray[np.integer]) -> float:
    """Return the negative entropy, in nats, of labels (n,) given the model's answers (n,); 0 is the best."""
    known, z = np.unique(answers, return_inverse=True)
    classes, y = np.unique(labels, return_inverse=True)
    counts = np.zeros((len(classes), len(known)))
    np.add.at(counts, (y, z), 1)
    return float(np.log((counts / counts.sum(0))[y, z]).mean())
