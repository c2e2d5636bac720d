"""Benchmarks: what our kernels and models cost beside what people would otherwise use."""
