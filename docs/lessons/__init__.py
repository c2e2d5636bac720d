"""The measured figures of docs/latent-diffusion.md, one lesson a file: ``python -m docs.lessons NAME``."""
