"""The exhibits of the paper."""
