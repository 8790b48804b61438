"""Whether a configuration can be served: options, mask file, model and parallelism.

Everything here is decided once a process: in vLLM's first one before it starts any other
(`refusals.py`), in a worker when the first attention layer is built, which is before weights are
loaded. Each refusal is one error that names the option or file.
"""

import functools

import numpy as np
from vllm.config import VllmConfig
from vllm.distributed.utils import get_pp_indices
from vllm.platforms import current_platform

from dam_vllm.engine.serving import Serving, read_masks
from dam_vllm.masks.fingerprint import fingerprint
from dam_vllm.masks.mask_set import HeadMode
from dam_vllm.masks.model_shape import model_shape
from dam_vllm.masks.sharding import shards
from dam_vllm.options import PAGE_MULTIPLES, DamOptions, OptionError, parse_options

CACHE_DTYPES = ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2")


def admit(config: VllmConfig) -> Serving:
    """Checks the configuration and loads the masks; cheap after the first call.

    Args:
        config: vLLM's configuration.

    Returns:
        What to serve with.

    Raises:
        OptionError: for an option, file or configuration that cannot be honoured.
        MaskFileError: for a missing or damaged mask file.
        FingerprintError: for a model whose files cannot be read.
    """
    _refuse_platform()
    _refuse_model(config)
    _refuse_parallelism(config)
    _refuse_cache(config)
    _refuse_draft_model(config)
    _refuse_sleep(config)
    model = config.model_config
    options = parse_options(config.additional_config)
    _refuse_options(options)
    serving = _load(
        options,
        model.model,
        model.revision,
        config.load_config.download_dir,
        config.load_config.load_format == "dummy",
    )
    _refuse_other_shape(config, serving)
    _refuse_connector(config, serving)
    _refuse_exact_tails(serving)
    _refuse_far_anchors(config, serving)
    return serving


@functools.lru_cache(maxsize=1)
def _load(
    options: DamOptions, model: str, revision: str | None, cache_dir: str | None, dummy: bool
) -> Serving:
    serving = read_masks(options, model, revision, cache_dir)
    file, masks = serving.file, serving.masks
    strict = options.fingerprint == "strict" and masks.header.fingerprint.weights is not None
    served = fingerprint(model, revision, cache_dir, weights=strict and not dummy)
    difference = masks.header.fingerprint.mismatch(served)
    if difference == "config":
        raise OptionError(
            f"mask file {file} was made for another model ({masks.header.model}): its "
            f"fingerprint is {masks.header.fingerprint.config}, {model} has {served.config}; "
            f"calibrate {model} itself"
        )
    if difference == "weights" and strict:
        raise OptionError(
            f"mask file {file} was made for other weights ({masks.header.model}): fingerprint "
            f"{masks.header.fingerprint.weights}, {model} has {served.weights}; calibrate it, or "
            f'set "fingerprint": "config" in --additional-config to accept masks of a model of '
            f"the same shape"
        )
    return serving


def may_free_heads(options: DamOptions) -> bool:
    """Whether pages of single KV heads may be freed, not of whole layers alone."""
    return options.kv_free == "head" or (options.kv_free == "auto" and current_platform.is_cpu())


def _refuse_platform() -> None:
    if current_platform.device_name not in PAGE_MULTIPLES:
        raise OptionError(
            f"--attention-backend dam: it serves on {' and '.join(PAGE_MULTIPLES)}, not on "
            f"{current_platform.device_name}; leave the option away"
        )


def _refuse_model(config: VllmConfig) -> None:
    """Refuses models of a kind that DAM does not serve."""
    model = config.model_config
    kinds = {
        "multi-head latent attention (MLA)": model.use_mla,
        "no attention layers": model.is_attention_free,
        "an encoder": model.is_encoder_decoder or model.attn_type == "encoder_only",
    }
    for kind in (kind for kind, found in kinds.items() if found):
        raise OptionError(
            f"--attention-backend dam: model {model.model} has {kind}, which DAM does not serve; "
            f"leave the option away"
        )


def _refuse_other_shape(config: VllmConfig, serving: Serving) -> None:
    """Refuses masks with other layers or heads than the model, whatever their fingerprint."""
    model, masks = config.model_config, serving.masks
    shape, dynamic = model_shape(model.hf_config), masks.dynamic
    pairs = {
        "layers": (masks.layers, len(shape.layer_types)),
        "query heads": (masks.heads, shape.heads),
        "KV heads": (masks.kv_heads, model.get_total_num_kv_heads()),
        "layer types": (masks.header.layer_types, shape.layer_types),
    }
    if dynamic is not None:
        pairs["channels a head"] = (dynamic.rotations.shape[-1], model.get_head_size())
    for what, (held, wanted) in pairs.items():
        if held != wanted:
            raise OptionError(
                f"mask file {serving.file} does not fit {model.model}: it has {what} {held}, the "
                f"model {wanted}; calibrate {model.model} itself"
            )


def _refuse_options(options: DamOptions) -> None:
    """Refuses values that this platform does not serve."""
    option = "--additional-config: dam"
    if current_platform.is_cpu():
        if options.kernel in ("flash", "triton"):
            raise OptionError(
                f"{option}.kernel is {options.kernel!r}: on CPU it must be 'auto' or 'naive'"
            )
        if options.granularity == "token" and options.kernel != "naive":
            raise OptionError(
                f"{option}.granularity is 'token': on CPU it needs kernel 'naive', "
                f"not {options.kernel!r}"
            )
        return
    if options.granularity == "token" and options.kernel == "flash":
        raise OptionError(
            f"{option}.granularity is 'token': it needs kernel 'auto', 'triton' or 'naive', "
            f"not 'flash'"
        )


def _refuse_connector(config: VllmConfig, serving: Serving) -> None:
    # Keys of dynamic heads are stored rotated: pages mean nothing to a process with other masks.
    # Tails are kept beside the cache, and do not come along with its pages.
    masks = serving.masks
    kinds = {
        "dynamic heads": (masks.modes == HeadMode.DYNAMIC).any(),
        "tails": masks.tails is not None,
    }
    if config.kv_transfer_config is None:
        return
    for kind in (kind for kind, present in kinds.items() if present):
        raise OptionError(
            f"--kv-transfer-config names {config.kv_transfer_config.kv_connector}: mask file "
            f"{serving.file} has {kind}, so that pages cannot leave the process; leave the "
            f"option away or serve masks without {kind}"
        )


def _refuse_exact_tails(serving: Serving) -> None:
    if serving.options.granularity == "token" and serving.masks.tails is not None:
        raise OptionError(
            f"--additional-config: dam.granularity is 'token': mask file {serving.file} has tails, "
            f"which stand for whole pages; set it to 'page'"
        )


def _refuse_far_anchors(config: VllmConfig, serving: Serving) -> None:
    """Refuses heads that reuse pages of a head which another worker holds."""
    masks, parallel = serving.masks, config.parallel_config
    if masks.anchors is None:
        return
    ranks = shards(masks.kv_heads, parallel.tensor_parallel_size)
    stages = parallel.pipeline_parallel_size
    starts = [get_pp_indices(masks.layers, stage, stages)[0] for stage in range(1, stages)]
    for layer, head in np.argwhere(masks.modes == HeadMode.REUSE).tolist():
        of_layer, of_head = masks.anchor(layer, head)
        far = {
            "pipeline": any(of_layer < start <= layer for start in starts),
            "tensor": any(rank.holds(head) and not rank.holds(of_head) for rank in ranks),
        }
        for kind in (kind for kind, found in far.items() if found):
            raise OptionError(
                f"--{kind}-parallel-size is {getattr(parallel, f'{kind}_parallel_size')}: in mask "
                f"file {serving.file} layer {layer}, KV head {head} reuses the pages that layer "
                f"{of_layer}, KV head {of_head} chooses, which another rank would hold; serve with "
                f"fewer ranks, or masks fitted without such anchors"
            )


def _refuse_parallelism(config: VllmConfig) -> None:
    parallel = config.parallel_config
    for option in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        size = getattr(parallel, option)
        if size > 1:
            raise OptionError(
                f"--{option.replace('_', '-')} is {size}: --attention-backend dam serves "
                f"without context parallelism, set it to 1"
            )
    if parallel.use_ubatching:
        raise OptionError(
            "--enable-dbo (or --ubatch-size above 1): --attention-backend dam plans one batch at "
            "a time, leave the option away"
        )


def _refuse_draft_model(config: VllmConfig) -> None:
    speculative = config.speculative_config
    # Draft layers of EAGLE and MTP are numbered after the model's own and are left to vLLM;
    # those of a whole draft model carry the same numbers as the layers that the masks are for.
    if speculative is not None and speculative.method == "draft_model":
        raise OptionError(
            "--speculative-config names a draft model: --attention-backend dam cannot tell its "
            "layers from the model's; use another method (ngram, eagle, mtp)"
        )


def _refuse_sleep(config: VllmConfig) -> None:
    # On CPU vLLM itself refuses it.
    if config.model_config.enable_sleep_mode:
        raise OptionError(
            "--enable-sleep-mode: --attention-backend dam keeps bases and counts beside the "
            "weights, which sleep of level 2 discards; leave the option away"
        )


def _refuse_cache(config: VllmConfig) -> None:
    cache = config.cache_config
    multiple = PAGE_MULTIPLES[current_platform.device_name]
    if cache.block_size is not None and cache.block_size % multiple:
        raise OptionError(
            f"--block-size is {cache.block_size}: --attention-backend dam needs pages of a "
            f"multiple of {multiple} tokens on {current_platform.device_name}"
        )
    if cache.cache_dtype not in CACHE_DTYPES:
        raise OptionError(
            f"--kv-cache-dtype is {cache.cache_dtype}: --attention-backend dam serves "
            f"{', '.join(CACHE_DTYPES)}"
        )
