"""The fit: for each KV head the cheapest mode that keeps its output (context-aware loss)."""
