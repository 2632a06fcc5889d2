"""Defaults of settings that several rooms share. The others stand with their settings."""

from __future__ import annotations


P_NORM = 0.8
LAMBDA_P = 0.01
# The magnitude below which a weight that is not zero counts as near zero in reports.
NEAR_ZERO_THRESHOLD = 1e-13
