"""Measures of models, each with an interval; importing this does not import torch."""
