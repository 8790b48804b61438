"""Attention on CUDA: planned on the device, run by FlashAttention or Triton."""
