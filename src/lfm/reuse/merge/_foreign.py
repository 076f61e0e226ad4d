"""Run a configuration of mergekit (YAML), unchanged: `merge` reads what mergekit-yaml and mergekit-multi do."""

from lfm.reuse.merge._mergekit.document import read

__all__ = ["read"]
