"""Counting zeros, and what is written about them: reports, the history of a run, its picture and its model card."""
