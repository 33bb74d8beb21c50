"""Causal and masked pretraining."""
