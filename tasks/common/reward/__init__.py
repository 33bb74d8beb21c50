"""Scoring of replies by a reward model, and the rankings that it is trained on."""
