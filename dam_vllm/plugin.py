"""What vLLM's entry point `vllm.general_plugins` calls, in every process of vLLM."""


def register() -> None:
    """Makes `--attention-backend dam` known to vLLM; harmless when called again."""
    from dam_vllm.engine.registration import register_backend

    register_backend()
