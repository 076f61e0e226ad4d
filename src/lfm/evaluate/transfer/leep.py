"""LEEP: how well the labels follow from the model's own classes, through the table of both.

    LEEP = 1/n sum_i log sum_z P(y_i | z) theta(x_i)_z,   P(y, z) = 1/n sum_{i: y_i = y} theta(x_i)_z

Nguyen et al. 2020, https://arxiv.org/abs/2002.12462. theta are the probabilities of the model's classes z.
"""

import numpy as np
from numpy.typing import NDArray


def leep(probs: NDArray[np.floating], labels: NDArray[np.integer]) -> float:
    """Return the mean log-likelihood of labels (n,) given probabilities (n, classes of the model); 0 is the best."""
    probs = np.asarray(probs, np.float64)
    classes, places = np.unique(labels, return_inverse=True)
    joint = np.zeros((len(classes), probs.shape[1]))
    np.add.at(joint, places, probs / len(probs))
    total = joint.sum(0)
    given = np.divide(joint, total, out=np.zeros_like(joint), where=total > 0)  # P(y | z)
    return float(np.log((probs * given[places]).sum(1)).mean())
