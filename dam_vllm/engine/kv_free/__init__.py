"""KV pages that no head can read any more are given back to vLLM."""
