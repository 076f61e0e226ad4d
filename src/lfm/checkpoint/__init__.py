"""Models on disk: read lazily and with suspicion, written in a stream and all or nothing, changed by deltas.

Importing this package does not import torch; reading a tensor does.
"""

from lfm.checkpoint._adapter import read_adapter, save_adapter
from lfm.checkpoint._delta import Change, Delta, Dense, LowRank, Patched, Replace, Scale, Sparse, compose
from lfm.checkpoint._digests import cache_folder
from lfm.checkpoint._header import Spec, read_header
from lfm.checkpoint._manifest import MANIFEST, STATE, NoWeights, manifest_digest
from lfm.checkpoint._open import Checkpoint, FileWeights, open_checkpoint, read_json, refuse_quantised
from lfm.checkpoint._shards import write_patched
from lfm.checkpoint._weights import RAW, MemoryWeights, Weights, combine, dtype_name, raw_bytes, torch_dtype
from lfm.checkpoint._write import SHARD_BYTES, OutputFolder, TensorWriter, check_free, remember_output

__all__ = [
    "MANIFEST",
    "RAW",
    "SHARD_BYTES",
    "STATE",
    "Change",
    "Checkpoint",
    "Delta",
    "Dense",
    "FileWeights",
    "LowRank",
    "MemoryWeights",
    "NoWeights",
    "OutputFolder",
    "Patched",
    "Replace",
    "Scale",
    "Sparse",
    "Spec",
    "TensorWriter",
    "Weights",
    "cache_folder",
    "check_free",
    "combine",
    "compose",
    "dtype_name",
    "manifest_digest",
    "open_checkpoint",
    "raw_bytes",
    "read_adapter",
    "read_header",
    "read_json",
    "refuse_quantised",
    "remember_output",
    "save_adapter",
    "torch_dtype",
    "write_patched",
]
