"""The common part of the training scripts on pictures and captions."""
