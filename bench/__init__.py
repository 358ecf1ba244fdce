"""Benchmarks of chunkft: every script prints one line a case and writes JSON."""
