"""Pruning a trained model in one go, block by block, from the inputs that calibration rows give its matrices."""
