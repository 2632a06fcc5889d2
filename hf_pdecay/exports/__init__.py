"""Models in few bits are written in the formats of other runtimes, code by code."""
