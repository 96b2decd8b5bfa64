"""Is the rule a good one? Many small problems, targets, and constants."""
