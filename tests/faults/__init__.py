"""Real runs that are killed: ``python -m tests.faults``, which ``make test-faults`` runs."""
