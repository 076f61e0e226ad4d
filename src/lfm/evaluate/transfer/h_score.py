"""H-score: the share of the features' variance, direction by direction, that lies between the classes.

    H = tr(cov(f)^-1 cov(E[f | y]))                                       Bao et al. 2019, arXiv:2212.10082
    H = (1 - a) tr(cov_a(f)^-1 cov(E[f | y])),  cov_a = (1 - a) cov(f) + a tr(cov(f))/d I

The second, `shrunk`, is that of Ibrahim, Ponomareva and Mazumder 2021, https://arxiv.org/abs/2110.06893; the shrinkage
a is Ledoit and Wolf's. Where there are no more examples than features, the first can only say that all classes can be
told apart.
"""

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.floating]


def h_score(features: Matrix, labels: NDArray[np.integer]) -> float:
    """Return the H-score of features (n, width) for labels (n,), between 0 and the number of classes less 1."""
    centred = np.asarray(features, np.float64) - features.mean(0, dtype=np.float64)
    # The pseudo-inverse by singular vectors: tr(cov(f)^-1 cov(g)) is what the means have along each of them.
    left, spread, _ = np.linalg.svd(centred, full_matrices=False)
    left = left[:, spread > spread.max(initial=0.0) * 1e-7]
    return float(sum((left[labels == one].sum(0) ** 2).sum() / (labels == one).sum() for one in np.unique(labels)))


def h_score_shrunk(features: Matrix, labels: NDArray[np.integer]) -> float:
    """Return the H-score with a shrunk covariance, which stays meaningful for few examples."""
    centred = np.asarray(features, np.float64) - features.mean(0, dtype=np.float64)
    amount, covariance = ledoit_wolf(centred)
    means = np.empty_like(centred)
    for one in np.unique(labels):
        means[labels == one] = centred[labels == one].mean(0)
    if amount >= 1 or not covariance.any():
        return 0.0
    between = means.T @ means / len(means)
    return float((1 - amount) * np.trace(np.linalg.pinv(covariance, hermitian=True) @ between))


def ledoit_wolf(centred: Matrix) -> tuple[float, Matrix]:
    """Return Ledoit and Wolf's (2004) shrinkage and the shrunk covariance of centred features (n, width)."""
    n, width = centred.shape
    plain = centred.T @ centred / n
    target = np.trace(plain) / width * np.eye(width)
    distance = ((plain - target) ** 2).sum()
    # Mean squared distance of the examples' own x x^T from the covariance, over n: the error of the covariance.
    error = ((centred**2).sum(1) ** 2).sum() / n**2 - (plain**2).sum() / n
    amount = float(min(error, distance) / distance) if distance > 0 else 1.0
    return amount, (1 - amount) * plain + amount * target
