"""The training loop, whatever is trained: settings, steps, checkpoints, losses, averages and memory."""
