"""Evaluation: exact match, negative log-likelihood and the parts of the scorecard."""
