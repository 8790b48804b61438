"""`dam-vllm calibrate`: texts and a model in, a mask file out."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dam_vllm.calibration.settings import CalibrationConfig, FitConfig, meaning
from dam_vllm.cli.program import INTERRUPTED, PROGRESS, Quiet
from dam_vllm.options import OptionError, masks_output_option

if TYPE_CHECKING:
    import torch

    from dam_vllm.calibration.pipeline import Job

AUTO = "auto"

ModelArgument = Annotated[
    str | None, typer.Argument(help="Folder or Hugging Face Hub id of the model.")
]
DataOption = Annotated[
    str | None,
    typer.Option(
        help="Texts: a text file, a folder of .txt, .md and .py files, a .jsonl file, or the "
        "name of a data set on the Hub."
    ),
]
OutputOption = Annotated[Path, typer.Option(help="Mask file to write (.safetensors).")]
ConfigOption = Annotated[
    list[str] | None,
    typer.Option(
        help="YAML file of settings, see `dam-vllm settings`; given again, a file goes before "
        "those named earlier, and the options below before all."
    ),
]
FieldOption = Annotated[
    str | None, typer.Option(help="Key of the text in JSONL and data sets (default: text).")
]
PclOption = Annotated[int | None, typer.Option(help=meaning(CalibrationConfig, "pcl"))]
ReachOption = Annotated[int | None, typer.Option(help=meaning(CalibrationConfig, "reach"))]
TargetErrorOption = Annotated[float | None, typer.Option(help=meaning(FitConfig, "target_error"))]
TargetDensityOption = Annotated[
    float | None, typer.Option(help=meaning(FitConfig, "target_density"))
]
TargetKvMemoryOption = Annotated[
    float | None, typer.Option(help=meaning(FitConfig, "target_kv_memory"))
]
RetargetOption = Annotated[
    Path | None,
    typer.Option(
        help="Choose anew from what this fitted mask file's frontier holds, for the target given "
        "beside; takes seconds, and neither MODEL nor --data."
    ),
]
TextsOption = Annotated[int | None, typer.Option(help=meaning(CalibrationConfig, "texts"))]
BatchSizeOption = Annotated[int | None, typer.Option(help=meaning(CalibrationConfig, "batch_size"))]
SeedOption = Annotated[int | None, typer.Option(help=meaning(CalibrationConfig, "seed"))]
MemoryGibOption = Annotated[
    float | None,
    typer.Option(help="Memory for attention maps, in GiB (default: half of what is free)."),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda or cuda:N (default: cuda where there is one).")
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        help="auto (the default: float32 on a CPU, else the model's), float32, bfloat16, float16."
    ),
]
RevisionOption = Annotated[str | None, typer.Option(help="Hub revision of the model.")]


def calibrate(
    output: OutputOption,
    model: ModelArgument = None,
    data: DataOption = None,
    config: ConfigOption = None,
    field: FieldOption = None,
    pcl: PclOption = None,
    reach: ReachOption = None,
    target_error: TargetErrorOption = None,
    target_density: TargetDensityOption = None,
    target_kv_memory: TargetKvMemoryOption = None,
    retarget: RetargetOption = None,
    texts: TextsOption = None,
    batch_size: BatchSizeOption = None,
    seed: SeedOption = None,
    memory_gib: MemoryGibOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    quiet: Quiet = False,
) -> None:
    """Calibrates a model's masks on texts (DAM, Stage 1) and writes a mask file.

    Ctrl-C saves what is done; the same command goes on from there.
    """
    from dam_vllm.calibration.model import ModelSource
    from dam_vllm.calibration.pipeline import Job
    from dam_vllm.calibration.settings_file import load_config

    source = {"model": model, "data": data, "config": config or None, "field": field}
    run = {"memory_gib": memory_gib, "device": device, "dtype": dtype, "revision": revision}
    overrides = {
        "pcl": pcl,
        "reach": reach,
        "texts": texts,
        "batch_size": batch_size,
        "seed": seed,
        "target_kv_memory": target_kv_memory,
    }
    targets = {"target_error": target_error, "target_density": target_density}
    _check(memory_gib, dtype or AUTO, output, model)
    if retarget is not None:
        _retarget(retarget, output, targets, source | run | overrides)
        return
    if model is None or data is None:
        raise OptionError(
            f"MODEL is {model!r} and --data is {data!r}: both must be given, unless --retarget is"
        )
    job = Job(
        source=ModelSource(model, revision, _device(device), dtype or AUTO),
        data=data,
        field=field or "text",
        config=load_config(config or [], overrides | targets),
        output=output,
        memory_gib=memory_gib,
    )
    _calibrate(job)


def _retarget(
    file: Path, output: Path, targets: dict[str, float | None], unused: dict[str, Any]
) -> None:
    from dam_vllm.calibration.retarget import retarget

    for name, value in unused.items():
        if value is not None:
            told = "MODEL" if name == "model" else f"--{name.replace('_', '-')}"
            raise OptionError(f"{told} is {value!r}, must be left away with --retarget")
    masks = retarget(file, output, **targets)
    chosen = masks.header.parameters["fit"]["chosen"]
    typer.echo(
        f"Wrote {output}: density {chosen['density']:.4f}, KL {chosen['loss']:.4f}, "
        f"cost {chosen['cost']:.4f}"
    )


def _check(memory_gib: float | None, dtype: str, output: Path, model: str | None) -> None:
    from dam_vllm.calibration.model import DTYPES

    if memory_gib is not None and memory_gib <= 0:
        raise OptionError(f"--memory-gib is {memory_gib}, must be more than 0")
    if dtype != AUTO and dtype not in DTYPES:
        raise OptionError(f"--dtype is {dtype!r}, must be one of auto, {', '.join(DTYPES)}")
    masks_output_option(output, model)


def _device(name: str | None) -> "torch.device":
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError(f"{device.type} is not served")
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(
            f"--device is {name!r}, must be cpu, cuda or cuda:N as this machine has: {reason}"
        ) from error
    return device


def _calibrate(job: "Job") -> None:
    """Calibrates, and says where an interrupted calibration goes on."""
    from dam_vllm.calibration.errors import CalibrationStopped

    try:
        _run(job)
    except CalibrationStopped:
        typer.echo(
            f"Stopped; what is done lies in {job.checkpoint}. The same command goes on from there.",
            err=True,
        )
        raise typer.Exit(INTERRUPTED) from None


def _run(job: "Job") -> None:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from transformers.utils import logging

    from dam_vllm.calibration.pipeline import calibrate
    from dam_vllm.calibration.progress import Reporter

    logging.disable_progress_bar()
    columns = (
        TextColumn("calibrating"),
        BarColumn(),
        TextColumn("{task.percentage:.0f}%"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=PROGRESS) as bar, _stop_flag() as stopped:
        task = bar.add_task("", total=None)
        masks = calibrate(
            job,
            Reporter(
                say=bar.console.print,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
                stop=lambda: bool(stopped),
            ),
        )
    kept = f"{masks.columns.sum()} columns and {masks.diagonals.sum()} diagonals kept"
    typer.echo(f"Wrote {job.output}: PCL {masks.pcl}, reach {masks.reach}, {kept}")


@contextmanager
def _stop_flag() -> Iterator[list[int]]:
    """A list that the first Ctrl-C or SIGTERM fills; a second one ends the program at once."""
    received: list[int] = []
    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: object) -> None:
        received.append(number)
        typer.echo("Stopping after this batch ...", err=True)
        for each, handler in former.items():
            signal.signal(each, handler)

    for number in former:
        signal.signal(number, handle)
    try:
        yield received
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
