"""Which pages are read: selection, plan and the naive oracle. Torch only, no vLLM."""
