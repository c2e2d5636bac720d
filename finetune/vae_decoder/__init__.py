"""Fine-tuning the VAE's decoder: its loss, and measures of pictures."""
