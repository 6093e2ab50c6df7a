"""The papers' small trained experiments, each to be run by itself: `python -m rc_probe.experiments.sorting`."""
