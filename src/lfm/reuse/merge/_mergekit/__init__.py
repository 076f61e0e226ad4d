"""Reads configurations of mergekit: their shape, what their parameters amount to, the steps that they mean."""
