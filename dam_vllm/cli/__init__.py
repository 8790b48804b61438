"""The command line `dam-vllm`."""
