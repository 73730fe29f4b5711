"""Benchmarks against real peers, run by `scripts/bench NAME`."""
