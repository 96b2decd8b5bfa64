"""Is the rule a good one? Many small problems, targets, constants, and hard cases."""
