"""Command line of the training: tokenizer, data, training and export, from nothing."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import Tokenizer

from dam_vllm.demo.training.export import export
from dam_vllm.demo.training.tokenizer import library_sources, train_tokenizer
from dam_vllm.demo.training.train import Trainer


def main(
    output: Annotated[Path, typer.Option(help="Folder of the model; holds checkpoints too.")],
    minutes: Annotated[float, typer.Option(min=0.1, help="Time to train.")] = 50.0,
    seed: Annotated[int, typer.Option(help="Seed of weights and data.")] = 0,
) -> None:
    """Trains the demo model; run it again with the same folder to go on after a stop."""
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    sources = library_sources()
    file = output / "bpe.json"
    if not file.is_file():
        train_tokenizer(sources).save(str(file))
    tokenizer = Tokenizer.from_file(str(file))
    network = Trainer(output, tokenizer, sources, 60 * minutes, seed).run()
    export(network, tokenizer, output / "model")
    typer.echo(f"model written to {output / 'model'}")


typer.run(main)
