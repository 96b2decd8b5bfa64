"""Five public training scripts in our own words, each as it is written and with `hidlr`."""
