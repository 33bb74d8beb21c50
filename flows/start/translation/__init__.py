"""Configurations of LLaMA-Factory and axolotl as settings and sources of a project."""
