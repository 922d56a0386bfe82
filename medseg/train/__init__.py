"""Training: the planner, the loop, checkpoints."""
