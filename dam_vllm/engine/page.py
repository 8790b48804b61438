"""Pages as large as those that masks were fitted for, unless the user says otherwise.

The size is settled before any worker starts: on CUDA vLLM would choose it after weights are loaded
(`update_block_size_for_backend`), when what is freed and how much memory plans take is decided.
"""

from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from dam_vllm.engine.serving import read_masks
from dam_vllm.options import PAGE, PAGE_MULTIPLES, parse_options


def settle_page(arguments: EngineArgs) -> None:
    """Sets `--block-size` where it was left open.

    Density and answers are those of the fit only with its pages; where nothing was fitted, or for
    pages that the platform does not take, they hold what vLLM takes on CPU and FlashAttention 3
    reads fastest.

    Args:
        arguments: of the engine, changed in place.

    Raises:
        OptionError: for an option that cannot be honoured.
        MaskFileError: for a missing or damaged mask file.
    """
    if arguments.block_size is not None:
        return
    options = parse_options(arguments.additional_config)
    served = arguments.model, arguments.revision, arguments.download_dir
    header = read_masks(options, *served).masks.header
    multiple = PAGE_MULTIPLES.get(current_platform.device_name, 1)
    fitted = header.fitted_page or PAGE
    arguments.block_size = PAGE if fitted % multiple else fitted
