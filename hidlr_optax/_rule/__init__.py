"""The transformation and its rules: what moves the learning rates, and the guard."""
