"""Training the shipped model from nothing: pictures, CLIP, VAE, noise predictor."""
