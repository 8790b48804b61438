"""Benchmarks: kernels, the plan, and end to end, always side by side with a peer."""
