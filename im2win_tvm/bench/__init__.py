"""Measuring: one protocol for every implementation, its record, and what is printed of it."""
