"""Benchmarks of the field, one declarative file each."""
