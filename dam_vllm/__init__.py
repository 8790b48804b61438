"""DAM (Dynamic Attention Mask, arXiv 2506.11104) for stock vLLM: sparse attention as paging."""

__version__ = "0.1.0"
