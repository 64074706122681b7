"""The device side: serves a model, keeps its user's data, trains on it in private."""

__version__ = "0.1.0"
