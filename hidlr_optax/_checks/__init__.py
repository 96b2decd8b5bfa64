"""Checks at the door: arguments, labels, what `update` is given, and advice on slips."""
