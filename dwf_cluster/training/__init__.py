"""Training: the epoch loop, the step on one batch, the probe after each epoch."""
