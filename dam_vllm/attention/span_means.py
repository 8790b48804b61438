"""Means of spans, kept beside the cache for the heads whose tails are made of them.

A span's mean lies where the cache holds the span's last page, so that a page that is found by its
prefix carries the mean of that prefix along. It is made of the cache in the step that holds the
span's last token: decoding would read everything otherwise.
"""

import torch


class SpanMeans:
    """Means beside the caches of one worker's layers, allocated when a cache is first met."""

    def __init__(self) -> None:
        """There are none yet."""
        self._beside: dict[int, torch.Tensor] = {}

    def of(self, key: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Means beside a cache.

        Args:
            key: [virtual pages, page, head_size], the cache's keys.
            dtype: of the means.

        Returns:
            [virtual pages, 2, head_size], mean keys and mean values, set where they were written.

        Raises:
            RuntimeError: if they are to be allocated while a CUDA graph is captured, which would
                write over them.
        """
        shape = (key.shape[0], 2, key.shape[2])
        means = self._beside.get(key.data_ptr())
        if means is None or means.shape != shape or means.dtype != dtype:
            if key.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "layers with tails must run once before a CUDA graph is captured"
                )
            means = torch.empty(shape, dtype=dtype, device=key.device)
            self._beside[key.data_ptr()] = means
        return means

    def clear(self) -> None:
        """Lets all of them go."""
        self._beside.clear()
