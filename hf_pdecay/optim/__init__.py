"""Optimizers with weight decay for any p norm. Nothing here knows of transformers.

Start with ``reference.py``, which has the whole update rule on one page.
"""
