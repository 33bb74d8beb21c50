"""Digests of a stage's code, from syntax trees: comments, messages and annotations do not change them."""
