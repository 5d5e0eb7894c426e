"""Measurements, side by side in one run: `python -m benchmarks`.  They never decide a test."""
