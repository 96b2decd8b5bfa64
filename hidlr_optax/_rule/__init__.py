"""The default rule, peak and hold: measure, rate, shape, guard; `hold` has their order."""
