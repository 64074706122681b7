"""Measures the device and builds its telemetry."""
