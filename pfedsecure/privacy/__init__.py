"""Differential privacy: what noise costs, how it is drawn, and what is written down about it."""
