"""Evaluation: replies, their scores, and how exact or surprised a model is."""
