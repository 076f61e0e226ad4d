"""Learn from models: tune, merge and measure checkpoints. Checkpoint in, checkpoint out.

    lfm.merge("ties", ["A", "B"], base="C", out="merged")     one step
    lfm.run("recipe.yaml")                                    many
    lfm.load("merged").complete(["Once upon a time"])         the result

Importing this imports neither torch nor numpy.
"""

__version__ = "0.1.0"

# The packages first: the first import of one puts it under its name here, and that must not be after the functions.
from lfm import distill as _distill  # noqa: F401
from lfm import edit as _edit  # noqa: F401
from lfm import evaluate as _evaluate  # noqa: F401
from lfm import tune as _tune  # noqa: F401
from lfm.api import advise, apply, distill, edit, ensemble, evaluate, load, merge, rank, revert, run, tune
from lfm.checkpoint import Checkpoint, Delta, open_checkpoint
from lfm.data import DataSpec
from lfm.errors import AccessError, BudgetError, LfmError, RequestError, UnsafeError
from lfm.method import Access, Data, Have, Needs, cards
from lfm.models.ledger import Budget
from lfm.models.ref import ModelRef
from lfm.recipe.step import Settings

__all__ = [
    "Access",
    "AccessError",
    "Budget",
    "BudgetError",
    "Checkpoint",
    "Data",
    "DataSpec",
    "Delta",
    "Have",
    "LfmError",
    "ModelRef",
    "Needs",
    "RequestError",
    "Settings",
    "UnsafeError",
    "__version__",
    "advise",
    "apply",
    "cards",
    "distill",
    "edit",
    "ensemble",
    "evaluate",
    "load",
    "merge",
    "open_checkpoint",
    "rank",
    "revert",
    "run",
    "tune",
]
