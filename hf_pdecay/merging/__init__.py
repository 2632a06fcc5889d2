"""Adapters are merged into sparse models, quantised ones too, whose zeros stay."""
