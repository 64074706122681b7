"""Private samples at rest."""
