"""Tuned configurations: their records, how one is found again, and the search that makes them."""
