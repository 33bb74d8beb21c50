"""Sampling of replies from a torch model."""
