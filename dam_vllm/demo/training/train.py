"""The training loop: growing lengths, loss mostly on answers, resumable."""

import json
import math
import os
import time
from collections import deque
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from dam_vllm.demo.training.circuits import wire
from dam_vllm.demo.training.muon import Muon
from dam_vllm.demo.training.network import Network
from dam_vllm.demo.training.samples import KINDS, TEMPLATE, TEXT, VALUE, Sample, Samples

# tokens, batch, share of the time at which the stage ends at the latest, mix over KINDS
STAGES = (
    (128, 16, 0.08, (0.35, 0.25, 0.0, 0.15, 0.25)),
    (256, 10, 0.16, (0.45, 0.25, 0.1, 0.15, 0.05)),
    (512, 6, 0.24, (0.45, 0.2, 0.15, 0.2, 0.0)),
    (1024, 4, 0.34, (0.45, 0.2, 0.15, 0.2, 0.0)),
    (2048, 2, 0.48, (0.45, 0.2, 0.15, 0.2, 0.0)),
    (4096, 1, 0.72, (0.45, 0.25, 0.12, 0.18, 0.0)),
    (8192, 1, 1.0, (0.45, 0.25, 0.12, 0.18, 0.0)),
)
SOLVED, SHORTER = 0.96, 0.45
MATRIX_RATE, VECTOR_RATE = 4e-3, 2e-3
SAVE_EVERY, LOG_EVERY = 120.0, 25


class Trainer:
    """Trains for a wall-clock budget; `run` goes on where a checkpoint stopped.

    Args:
        folder: where checkpoints lie.
        tokenizer: the demo model's tokenizer.
        sources: plain texts.
        seconds: budget.
        seed: of initialisation and data.
    """

    def __init__(
        self, folder: Path, tokenizer: Tokenizer, sources: list[str], seconds: float, seed: int
    ) -> None:
        self.folder, self.seconds = folder, seconds
        self.network = Network()
        self.spent, self.step, self.tokens, self.stage = 0.0, 0, 0, 0
        wire(self.network, seed)
        self._resume()
        self.rng = Random(f"{seed}/{self.step}")
        self.samples = Samples(tokenizer, sources, self.rng)
        matrices = [p for p in self.network.layers.parameters() if p.dim() == 2]
        chosen = {id(p) for p in matrices}
        self.rest = [p for p in self.network.parameters() if id(p) not in chosen]
        self.muon = Muon(matrices, 1.0)
        self.adam = torch.optim.AdamW(self.rest, lr=1.0, betas=(0.9, 0.97), weight_decay=0.0)
        self.scores: dict[str, deque[float]] = {}

    def run(self) -> Network:
        """Trains until the budget is spent; an interruption leaves a checkpoint."""
        saved = time.monotonic()
        try:
            while self.spent < self.seconds:
                began = time.monotonic()
                self._train_step()
                self.spent += time.monotonic() - began
                if self.step % LOG_EVERY == 0:
                    self._log()
                    self._next_stage()
                if time.monotonic() - saved > SAVE_EVERY:
                    self._save()
                    saved = time.monotonic()
        finally:
            self._save()
        return self.network

    def _train_step(self) -> None:
        longest, batch, _, mix = STAGES[self.stage]
        tokens = longest
        if self.stage >= 3 and self.rng.random() < SHORTER:
            tokens, batch = STAGES[self.rng.randrange(2, self.stage)][:2]
        kinds = self.rng.choices(KINDS, mix, k=batch)
        samples = [self.samples.draw(kind, tokens) for kind in kinds]
        ids, weights, positions = (
            torch.stack([torch.from_numpy(getattr(s, name)) for s in samples])
            for name in Sample.__dataclass_fields__
        )
        targets, weights = ids[:, 1:], self._thin(weights[:, 1:])
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.network(ids[:, :-1], positions[:, :-1], torch.bfloat16)
            logits = self.network.logits(hidden[weights > 0]).float()
        wanted, weight = targets[weights > 0], weights[weights > 0]
        losses = F.cross_entropy(logits, wanted, reduction="none")
        ((losses * weight).sum() / weight.sum()).backward()
        if tokens == longest:
            self._score(kinds, weights, logits.argmax(-1) == wanted)
        self._update()
        self.step += 1
        self.tokens += tokens * batch

    def _thin(self, weights: torch.Tensor) -> torch.Tensor:
        """Keeps a fifth of the template tokens at five times their weight."""
        template = weights == torch.tensor(TEMPLATE)
        kept = torch.rand(weights.shape) < 0.2
        return torch.where(template, torch.where(kept, weights * 5, 0.0), weights)

    def _update(self) -> None:
        done = self.spent / self.seconds
        decay = 1.0 if done < 0.5 else 0.04 + 0.48 * (1 + math.cos(math.pi * (2 * done - 1)))
        factor = min(1.0, (self.step + 1) / 80) * decay
        torch.nn.utils.clip_grad_norm_(self.rest, 1.0)
        for group in self.muon.param_groups:
            group["lr"] = MATRIX_RATE * factor
        self.muon.step()
        self.muon.zero_grad(set_to_none=True)
        for group in self.adam.param_groups:
            group["lr"] = VECTOR_RATE * factor
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)

    def _score(self, kinds: list[str], weights: torch.Tensor, right: torch.Tensor) -> None:
        row = torch.arange(len(kinds))[:, None].expand_as(weights)[weights > 0]
        weight = weights[weights > 0]
        for index, kind in enumerate(kinds):
            counted = (row == index) & (weight == (TEXT if kind == "text" else VALUE))
            if counted.any():
                scores = self.scores.setdefault(kind, deque(maxlen=25))
                scores.append(right[counted].float().mean().item())

    def _next_stage(self) -> None:
        latest = STAGES[self.stage][2] * self.seconds
        lines = self.scores.get("lines", ())
        solved = len(lines) == 25 and sum(lines) / 25 > SOLVED
        if self.stage < len(STAGES) - 1 and (solved or self.spent > latest):
            self.stage += 1
            self.scores.clear()

    def _log(self) -> None:
        scores = {kind: round(sum(s) / len(s), 3) for kind, s in sorted(self.scores.items())}
        print(
            f"{self.spent:5.0f} s of {self.seconds:.0f}, step {self.step}, "
            f"{STAGES[self.stage][0]} tokens, {self.tokens / 1e6:.2f}M seen: {scores}",
            flush=True,
        )

    def _save(self) -> None:
        temporary = self.folder / "checkpoint.tmp"
        state = {"spent": self.spent, "step": self.step, "tokens": self.tokens, "stage": self.stage}
        save_file(self.network.state_dict(), temporary, {"state": json.dumps(state)})
        os.replace(temporary, self.folder / "checkpoint.safetensors")

    def _resume(self) -> None:
        from safetensors import safe_open

        file = self.folder / "checkpoint.safetensors"
        if file.is_file():
            self.network.load_state_dict(load_file(file))
            with safe_open(file, framework="pt") as opened:
                for name, value in json.loads(opened.metadata()["state"]).items():
                    setattr(self, name, value)
