"""Noise calibration and the statement a release carries."""
