"""Alignment with a reward: what PPO and the methods beside it share."""
