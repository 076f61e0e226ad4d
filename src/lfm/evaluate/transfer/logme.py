"""LogME: how probable the labels are under the best Bayesian linear model on the features.

    log p(y | F) = max over alpha, beta of  log N(y | 0, I / beta + F F^T / alpha),  per example, mean over classes

You et al. 2021, https://arxiv.org/abs/2102.11005; the labels of each class are 0 and 1. The maximum is found by the
fixed point of MacKay: alpha = gamma / |m|^2, beta = (n - gamma) / |y - F m|^2, where m are the weights' mean and
gamma = sum_k s_k^2 / (s_k^2 + alpha / beta).

One singular value decomposition F = U S V^T serves all classes and steps (You et al. 2022,
https://arxiv.org/abs/2110.10545), so that a step costs as much as the rank; a plain step would invert a matrix.
"""

import numpy as np
from numpy.typing import NDArray

STEPS = 100
TOLERANCE = 1e-4  # relative change of alpha / beta
TINY = 1e-5  # keeps a perfect fit finite, as in the authors' code


def logme(features: NDArray[np.floating], labels: NDArray[np.integer]) -> float:
    """Return the evidence of the labels (n,) given the features (n, width), in nats per example; higher is better."""
    left, spread, _ = np.linalg.svd(np.asarray(features, np.float64), full_matrices=False)
    kept = spread > spread.max(initial=0.0) * 1e-7  # features come in float32
    # The scale of the features does not change the maximum; taking it out keeps TINY small beside everything.
    sigma = (spread[kept] / spread.max(initial=1e-300)) ** 2
    return float(np.mean([_evidence(left[:, kept], sigma, labels == one) for one in np.unique(labels)]))


def _evidence(left: NDArray[np.floating], sigma: NDArray[np.floating], is_class: NDArray[np.bool_]) -> float:
    targets = is_class.astype(np.float64)
    n = len(targets)
    explained = (left.T @ targets) ** 2
    outside = max(float(targets @ targets - explained.sum()), 0.0)  # what no linear model reaches
    alpha = beta = 1.0
    for _ in range(STEPS):
        ratio = alpha / beta
        gamma = float((sigma / (sigma + ratio)).sum())
        size = float((sigma * explained / (sigma + ratio) ** 2).sum())
        rest = float((explained * (ratio / (sigma + ratio)) ** 2).sum()) + outside
        alpha, beta = gamma / (size + TINY), (n - gamma) / (rest + TINY)
        if abs(alpha / beta - ratio) <= TOLERANCE * ratio:
            break
    log_determinant = float(np.log1p(beta * sigma / alpha).sum())  # directions without features cancel
    fit = beta * rest + alpha * size
    return float(n * np.log(beta) - n * np.log(2 * np.pi) - log_determinant - fit) / (2 * n)
