"""Serves the demo model on a GPU and holds its answers against stock vLLM's: the part `serve`.

Masks that keep everything must answer as stock does, the model's own must find what was asked for.
Kernels that are compiled after the start end the server (`--jit-monitor-mode error`).
"""

import sys
import tempfile
from pathlib import Path

import openai

from dam_vllm.demo import model_dir
from dam_vllm.masks.baselines import dense
from dam_vllm.masks.file import save_mask_set
from dam_vllm.server import Server

ARGUMENTS = ("--max-model-len=8192", "--jit-monitor-mode=error")
PROMPTS = [[1, *(300 + (7 * row + 37 * at) % 1900 for at in range(length))]
           for row, length in enumerate((6001, 2999, 150, 1))]  # fmt: skip
# Shares of greedy tokens: rounding parts answers at ties, wrong kernels part them at once.
AGREEMENT = 0.8


def answers(*arguments: str) -> list[list[str]]:
    """Greedy tokens of all prompts, asked at once, with a server of its own."""
    with Server(model_dir(), [*ARGUMENTS, *arguments]) as server:
        client = openai.OpenAI(base_url=server.url, api_key="-", timeout=120)
        reply = client.completions.create(
            model=str(model_dir()), prompt=PROMPTS, max_tokens=64, temperature=0, logprobs=1,
            extra_body={"ignore_eos": True, "return_tokens_as_token_ids": True},
        )  # fmt: skip
    choices = sorted(reply.choices, key=lambda choice: choice.index)
    return [list(choice.logprobs.tokens) for choice in choices if choice.logprobs]


def main() -> int:
    """Compares; 1 where answers differ."""
    stock = answers()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole.safetensors"
        save_mask_set(dense(str(model_dir())), whole)
        for kernel in ("flash", "triton"):
            dam = f'{{"dam": {{"masks": "{whole}", "dense_below": 0, "kernel": "{kernel}"}}}}'
            found = answers("--attention-backend=dam", "--additional-config", dam)
            first = [one[0] == other[0] for one, other in zip(stock, found, strict=True)]
            print(f"{kernel}: {sum(first)} of {len(first)} first tokens as stock's")
            failed |= sum(first) < AGREEMENT * len(first)
        fitted = answers("--attention-backend=dam")
        print(f"fitted masks: {sum(map(len, fitted))} tokens without a failure")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
