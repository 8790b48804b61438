"""`dam-vllm push`: a mask file to the Hugging Face Hub."""

from pathlib import Path
from typing import Annotated

import typer

from dam_vllm.cli.program import PROGRESS, Quiet


def push(
    file: Annotated[Path, typer.Argument(help="Mask file (.safetensors).")],
    repository: Annotated[str, typer.Argument(help='Hub id, "organisation/name".')],
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Uploads a mask file with a card that tells what it holds.

    The repository is made if need be; of one that exists the card (README.md) is replaced. Log in
    first: `hf auth login`, or HF_TOKEN.
    """
    from huggingface_hub.utils.tqdm import disable_progress_bars
    from rich.text import Text

    from dam_vllm import hub
    from dam_vllm.masks.card import mask_card
    from dam_vllm.masks.file import load_mask_set
    from dam_vllm.options import OptionError

    if not hub.is_hub_id(repository):
        raise OptionError(
            f'REPOSITORY is {repository!r}, must be a Hub id of the form "organisation/name"'
        )
    card = mask_card(load_mask_set(file), repository)
    disable_progress_bars()
    with PROGRESS.status(Text(f"uploading {file}")):
        commit = hub.push(file, card, repository, private)
    typer.echo(f"Uploaded {file}: {commit}")
