"""Measuring and showing: evaluation, tuning, benchmarks and reports."""
