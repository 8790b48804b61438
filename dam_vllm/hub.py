"""Masks on the Hugging Face Hub: a repository holds one mask file, beside weights or alone."""

import re
from pathlib import Path

MASKS_IN_REPOSITORY = "dam/masks.safetensors"
CARD = "README.md"


class HubError(ValueError):
    """A repository that cannot be read or written; the message says why, and what to do."""


def is_hub_id(place: str) -> bool:
    """Whether a place has the form of a Hub id, "organisation/name", and is no mask file's path."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", place)) and not place.endswith(
        (".safetensors", ".partial")
    )


def fetch(repository: str, revision: str | None = None, cache: str | None = None) -> Path:
    """Downloads a repository's mask file, or takes it from the cache.

    Args:
        repository: Hub id.
        revision: branch, tag or commit.
        cache: folder that it is kept in, or None for the Hub's own.

    Returns:
        Path of the file in the cache.

    Raises:
        HubError: if there is no such file, or the Hub cannot be reached and it is not in the cache.
    """
    from httpx import HTTPError
    from huggingface_hub import hf_hub_download

    try:
        file = hf_hub_download(repository, MASKS_IN_REPOSITORY, revision=revision, cache_dir=cache)
    except (OSError, ValueError, HTTPError) as error:
        raise HubError(_reason(error, repository)) from error
    return Path(file)


def push(file: Path, card: str, repository: str, private: bool) -> str:
    """Uploads a mask file and its card in one commit; the repository is made if need be.

    Args:
        file: the mask file.
        card: README.md of the repository.
        repository: Hub id.
        private: whether a new repository is private.

    Returns:
        URL of the commit.

    Raises:
        HubError: if the Hub refuses it or cannot be reached.
    """
    from httpx import HTTPError
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.create_commit(
            repository,
            [
                CommitOperationAdd(MASKS_IN_REPOSITORY, file),
                CommitOperationAdd(CARD, card.encode()),
            ],
            commit_message="DAM masks",
        )
    except (OSError, ValueError, HTTPError) as error:
        raise HubError(_reason(error, repository)) from error
    return str(commit.commit_url)


def _reason(error: Exception, repository: str) -> str:
    """What went wrong in one line, and what to do."""
    from huggingface_hub import constants, errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    place = f"Hub repository {repository!r}"
    if isinstance(error, errors.HFValidationError):
        return f'{place}: a Hub id must have the form "organisation/name"'
    gated = isinstance(error, errors.GatedRepoError)
    # The Hub answers 401 for what does not exist too.
    if isinstance(error, errors.RepositoryNotFoundError) and not gated:
        return f"{place} does not exist, or is private: check the name, or set HF_TOKEN"
    if gated or status in (401, 403):
        return f"{place}: no access; log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{place} has no such revision"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f"{place} holds no {MASKS_IN_REPOSITORY}"
    if status is not None:
        return f"{place}: the Hub answers {str(error).splitlines()[0]}"
    if constants.HF_HUB_OFFLINE:
        return f"{place} is not in the cache, and HF_HUB_OFFLINE is set: unset it, or give a file"
    reached = f"{constants.ENDPOINT} cannot be reached"
    return f"{place}: {reached}: check the network, or give a file ({str(error).splitlines()[0]})"
