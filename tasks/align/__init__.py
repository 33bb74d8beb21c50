"""Align a model with a reward or with preferences: PPO, DPO, RLOO, GRPO."""
