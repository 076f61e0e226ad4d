"""Nearest centroid: the plainest classifier on the features, each example left out in turn. The control.

    answer_i = argmin_c |f_i - mean of f_j over j != i with y_j = c|

A score that ranks models no better than this is not worth its formula.
"""

import numpy as np
from numpy.typing import NDArray


def centroid(features: NDArray[np.floating], labels: NDArray[np.integer]) -> float:
    """Return the accuracy, from 0 to 1, of features (n, width) for labels (n,); an only one of a class is wrong."""
    points = np.asarray(features, np.float64)
    classes, places = np.unique(labels, return_inverse=True)
    counts = np.bincount(places)
    sums = np.zeros((len(classes), points.shape[1]))
    np.add.at(sums, places, points)
    means = sums / counts[:, None]
    distances = (points**2).sum(1)[:, None] - 2 * points @ means.T + (means**2).sum(1)
    own = np.arange(len(points)), places
    # Without itself, the centroid of its own class is n / (n - 1) times as far away.
    factor = np.divide(counts, counts - 1, out=np.full(len(counts), np.inf), where=counts > 1)[places]
    distances[own] = np.maximum(((points - means[places]) ** 2).sum(1), 1e-300) * factor**2
    return float((distances.argmin(1) == places).mean())
