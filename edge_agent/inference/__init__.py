"""Runtimes behind one protocol, and the engine that checks, runs and swaps models."""
