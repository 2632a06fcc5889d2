"""Which weights decay, and how: ``lp_rules`` and module types become param groups."""
