"""Writes results.json: TRL's generalised JSD on the logits of inputs.py.

cd tests/golden/trl && python make.py       where trl 1.16.0 is installed
"""

import json

from inputs import BETAS, RESULTS, TEMPERATURES, logits
from trl.experimental.gkd import GKDTrainer

if __name__ == "__main__":
    student, teacher, labels = logits()
    found = {
        f"{beta} {temperature}": float(
            GKDTrainer.generalized_jsd_loss(student, teacher, labels, beta=beta, temperature=temperature)
        )
        for beta in BETAS
        for temperature in TEMPERATURES
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
