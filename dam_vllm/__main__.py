"""`python -m dam_vllm` does what `dam-vllm` does."""

from dam_vllm.cli.main import main

if __name__ == "__main__":
    main()
