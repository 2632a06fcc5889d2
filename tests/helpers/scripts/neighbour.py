"""Imported by the script beside it."""
