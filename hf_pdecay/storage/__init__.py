"""Smaller files: models are stored without their zeros, and plain ``from_pretrained`` loads them."""
