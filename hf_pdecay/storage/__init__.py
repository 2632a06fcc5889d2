"""Smaller files: models whose zeros are not stored, and the loader that plain ``from_pretrained`` uses for them."""
