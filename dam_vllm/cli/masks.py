"""`dam-vllm masks dense|streaming`: mask files without calibration."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Write baseline masks, without calibration.", no_args_is_help=True)

Model = Annotated[str, typer.Argument(help="Model folder or Hugging Face Hub id.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Mask file to write (safetensors).")]


@app.command()
def dense(model: Model, output: Output) -> None:
    """Every head reads every page: full attention through the same engine."""
    from dam_vllm.masks import baselines
    from dam_vllm.masks.file import save_mask_set
    from dam_vllm.options import masks_output_option

    masks_output_option(output, model)
    save_mask_set(baselines.dense(model), output)
    typer.echo(f"wrote {output}")


@app.command()
def streaming(
    model: Model,
    output: Output,
    sinks: Annotated[int, typer.Option(help="Tokens kept at the start.")] = 16,
    window: Annotated[int, typer.Option(help="Latest tokens kept.")] = 1024,
) -> None:
    """Every head reads the first and the latest tokens (StreamingLLM)."""
    from dam_vllm.masks import baselines
    from dam_vllm.masks.file import save_mask_set
    from dam_vllm.options import masks_output_option

    masks_output_option(output, model)
    save_mask_set(baselines.streaming(model, sinks, window), output)
    typer.echo(f"wrote {output}")
