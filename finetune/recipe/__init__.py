"""What the training scripts on pictures and captions have in common."""
