"""The autoencoder and its discriminator."""
