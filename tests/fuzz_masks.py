"""Mutated mask files, each loaded: `python -m tests.fuzz_masks --mutations 10000 --seed 1`.

A mutated file must end in one `MaskFileError`, or be read as what it provably holds: the masks that
it was made of where the digest was left as it was, and where it was made right again (a digest is
no signature), masks whose every value means something by the checks below, which know nothing of
the loader. No other exception, no hang, and no more than 1 GiB.
"""

import argparse
import json
import resource
import signal
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

import dam_vllm
from dam_vllm.masks.density import density
from dam_vllm.masks.file import MaskFileError, load_mask_set, save_mask_set
from dam_vllm.masks.frontier_arrays import DYNAMIC_FIELDS
from dam_vllm.masks.mask_set import Header
from dam_vllm.masks.targets import at_target
from tests.frontiers import with_frontier
from tests.mask_files import Parts, full_mask_set
from tests.mutations import mutated

SHIPPED = Path(dam_vllm.__file__).parent / "demo" / "model" / "dam" / "masks.safetensors"
MEMORY = 2**30
SECONDS = 60


class Source:
    """A file that is mutated: its bytes, its parts, and the masks in it."""

    def __init__(self, path):
        self.data, self.parts, self.masks = path.read_bytes(), Parts.of(path), load_mask_set(path)


def told(path):
    """Header and arrays of a file as safetensors reads it, by their names in it."""
    parts = Parts.of(path)
    header = Header.model_validate_json(parts.metadata["header"])
    for name in ("columns", "diagonals"):
        bits = np.unpackbits(parts.arrays[name], axis=-1)
        parts.arrays[name] = bits[..., : header.reach or header.pcl].astype(bool)
    true_bits = zlib.decompress(parts.arrays["true_bits"].tobytes())
    shape = (*parts.arrays["columns"].shape[:2], -1)
    parts.arrays["true_bits"] = np.frombuffer(true_bits, np.uint8).reshape(shape)
    return header, parts.arrays


def held(masks):
    """Header and arrays of masks, likewise."""
    arrays = {name: value for name, value in vars(masks).items() if isinstance(value, np.ndarray)}
    for group in ("dynamic", "frontier"):
        if (own := getattr(masks, group)) is not None:
            arrays |= {f"{group}.{name}": value for name, value in vars(own).items()}
    return masks.header, arrays


def check_same(found, expected):
    """Holds two headers with arrays against each other, NaN for NaN."""
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    for name, array in expected[1].items():
        assert found[1][name].dtype == array.dtype
        np.testing.assert_array_equal(found[1][name], array)


def check_meaning(masks):
    """Holds masks against what a mask file may say, one head after the other."""
    full = [kind == "full" for kind in masks.header.layer_types]
    assert 1 <= masks.pcl <= masks.reach == masks.diagonals.shape[2]
    for layer in range(masks.layers):
        assert full[layer] or not masks.columns[layer].any()
        assert full[layer] or not np.unpackbits(masks.true_bits[layer]).any()
        for head in range(masks.kv_heads):
            check_mode(masks.modes, masks.anchors, masks.tails, full, layer, head)
            if masks.dynamic is not None:
                check_dynamic(masks.dynamic, layer, head)
    for name in ("coverage", "coverage_extended", "density_heads", "density_kv"):
        for value in () if getattr(masks, name) is None else getattr(masks, name).flat:
            assert 0 <= value < 1.02 or (np.isnan(value) and name.startswith("coverage"))
    if masks.density_lengths is not None:
        lengths = masks.density_lengths.tolist()
        assert lengths == sorted(set(lengths))
        assert lengths[0] > 0
    if masks.frontier is not None:
        check_frontier(masks, full)


def check_mode(modes, anchors, tails, full, layer, head):
    """The same of one KV head's mode, anchor and tail."""
    assert modes[layer, head] in (0, 1, 2, 3)
    if tails is not None and tails[layer, head] != 0:
        assert tails[layer, head] == 1
        assert modes[layer, head] != 2
        assert full[layer]
    if modes[layer, head] == 3:
        above, anchor = anchors[layer, head].tolist()
        assert 0 <= above <= layer
        assert 0 <= anchor < modes.shape[1]
        assert modes[above, anchor] == 1
        assert full[above]
    else:
        assert anchors is None or (anchors[layer, head] == -1).all()


def check_frontier(masks, full):
    """The same of every choice, each of which is taken by its density, and by its loss."""
    frontier = masks.frontier
    for point, (read, loss) in enumerate(zip(frontier.density, frontier.kl, strict=True)):
        own = {name: getattr(frontier, name)[point] for name in DYNAMIC_FIELDS}
        dynamic = None if masks.dynamic is None else replace(masks.dynamic, **own)
        modes, anchors = frontier.modes[point], frontier.anchors[point]
        tails = frontier.tails[point]
        for layer, head in np.ndindex(modes.shape):
            check_mode(modes, anchors, tails, full, layer, head)
            assert dynamic is not None or modes[layer, head] != 1
            if dynamic is not None:
                check_dynamic(dynamic, layer, head)
        for target in ({"target_density": float(read)}, {"target_error": float(loss)}):
            taken = at_target(masks, **target)
            assert taken.header.fitted_page >= 1
            for layer, kind in enumerate(full):
                bits = (taken.columns[layer], taken.diagonals[layer], taken.true_bits[layer])
                assert kind or not any(part.any() for part in bits)


def check_dynamic(dynamic, layer, head):
    """The same of one KV head's basis and budget."""
    rotation = dynamic.rotations[layer, head].astype(np.float64)
    assert np.abs(rotation @ rotation.T - np.eye(len(rotation))).max() < 1e-2
    assert 1 <= dynamic.channels[layer, head] <= len(rotation)
    budget = dynamic.budget(layer, head, 16)
    assert np.isfinite(budget.value)
    assert budget.value >= 0
    assert budget.kind == 0 or budget.value <= 1
    assert 0 <= dynamic.floors[layer, head] <= dynamic.caps[layer, head]
    assert 0 <= dynamic.expected[layer, head] <= 1


def outcome(path, source, sealed):
    """Loads a mutated file and says in a word what came of it."""
    try:
        masks = load_mask_set(path)
    except MaskFileError as error:
        message = str(error)
        assert str(path) in message
        assert message.isprintable()
        assert len(message) < 1000
        return "refused"
    check_same(held(masks), told(path) if sealed else held(source.masks))
    if not sealed:
        return "the same masks"
    check_meaning(masks)
    if masks.pcl < 256:  # it can be used, and written again
        density(masks, [333], 16)
        save_mask_set(masks, path)
        check_same(held(load_mask_set(path)), held(masks))
    return "other masks of the right meaning"


def mutate(sources, seed, index, path):
    """Makes the mutation of a number, and loads it."""
    rng = np.random.default_rng([seed, index])
    source = sources[index % len(sources)]
    name, data, sealed = mutated(rng, source.data, source.parts)
    path.write_bytes(data)
    try:
        return outcome(path, source, sealed)
    except Exception as error:
        error.add_note(f"by {name}: --seed {seed} --only {index} repeats it")
        raise


def limit_memory():
    """Lets this process take so much more address space than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def peak():
    """Most memory that this process ever took, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutations", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="repeat the mutation of this number")
    options = parser.parse_args()
    counts, failures, start = Counter(), 0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "small.safetensors"
        rng = np.random.default_rng(options.seed)
        save_mask_set(with_frontier([full_mask_set(rng, reach=101) for _ in range(4)]), small)
        sources = [Source(small), Source(SHIPPED)]
        before = peak()
        limit_memory()
        one = options.only
        for index in range(options.mutations) if one is None else [one]:
            signal.alarm(SECONDS)  # which ends the process: a hang
            try:
                counts[mutate(sources, options.seed, index, Path(folder) / "mutated")] += 1
            except Exception:
                failures += 1
                traceback.print_exc(limit=-2)
            signal.alarm(0)
    report = {
        "seed": options.seed,
        "mutations": options.mutations if one is None else 1,
        **counts,
        "failures": failures,
        "MiB": round(peak() - before),
        "seconds": round(time.monotonic() - start),
    }
    print(json.dumps(report))
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
