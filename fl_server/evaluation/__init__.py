"""How good a candidate is, and whether it may replace the champion."""
