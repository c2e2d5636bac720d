"""Adapting the model: LoRA, hypernetworks, VAE decoder; `pretrain` trains the shipped model from nothing."""
