"""Default values of p and λ_p. The other defaults stand with their settings."""

from __future__ import annotations


P_NORM = 0.8
LAMBDA_P = 0.01
