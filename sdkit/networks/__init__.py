"""The networks: the noise predictor, the autoencoder, the text encoder, the depth estimator; their configurations."""
