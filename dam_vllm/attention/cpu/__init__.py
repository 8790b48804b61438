"""Attention on CPU: planned on the host, run by a paged kernel that is handed in."""
