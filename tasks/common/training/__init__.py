"""Training: the loop that the stages share, objectives, losses, optimizers, engines of several processes, curves."""
