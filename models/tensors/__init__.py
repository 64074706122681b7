"""Arithmetic that devices and coordinator must do alike; NumPy only."""
