"""Development-only helpers: real tools, real images and comparisons for tests, demo and benchmarks."""
