"""The parts of benchmarks that run inside vLLM; nothing else of `bench` imports it."""
