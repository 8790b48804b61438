"""The only room that imports vLLM: backend, metadata, kernels on its cache."""
