"""The ways to choose which weights of a trained model become zero."""

METHODS = ("fisher", "sparsegpt", "wanda", "magnitude")
WITH_HESSIAN = METHODS[:2]

AUTO, OFF = "auto", "off"
"""How a run begins, beside a method: as the model asks for it, or dense."""
