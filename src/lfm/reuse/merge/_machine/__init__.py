"""The machine that merges run on: arithmetic written down as arrays, turned into programs, run over chunks."""
