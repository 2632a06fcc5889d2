"""Default values of settings about counting."""

from __future__ import annotations


# The magnitude below which a weight that is not zero counts as near zero in reports.
NEAR_ZERO_THRESHOLD = 1e-13
