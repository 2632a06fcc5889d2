"""The command ``hf-pdecay``."""
