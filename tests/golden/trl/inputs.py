"""The logits that TRL's divergence was computed on, made from a seed by numpy alone."""

from pathlib import Path

import numpy as np
import torch

RESULTS = Path(__file__).parent / "results.json"
BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
TEMPERATURES = (0.7, 1.0, 2.0)


def logits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return student's and teacher's logits (3, 5, 11), and labels of which some are left out."""
    generator = np.random.default_rng(0)
    student, teacher = (torch.tensor(generator.standard_normal((3, 5, 11)) * 3).float() for _ in range(2))
    labels = torch.tensor(generator.integers(0, 11, (3, 5)))
    labels[0, :3] = labels[2, 4] = -100
    return student, teacher, labels
