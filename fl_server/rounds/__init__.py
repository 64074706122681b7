"""Rounds on Flower's Grid: cohort, spool, aggregation, checkpoint."""
