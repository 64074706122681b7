"""The enrolled devices: identity, state, telemetry."""
