"""Benchmarks against peers on the same machine in the same run; the machine's peak rate is printed first."""
