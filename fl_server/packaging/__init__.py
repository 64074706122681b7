"""From a definition and parameters to an immutable model version."""
