"""Training: the loop over a stack, schedules, corruptions, checkpoints, and the Tune trainable."""
