"""Parametrized weights of a task must not be taken from a cache, nor stay in it."""

from typing import Any

from torch.nn.utils import parametrize


class uncached:
    """Context in which `torch.nn.utils.parametrize.cached()` around it has no effect.

    The cache has one weight per layer, whatever the parameters; afterwards it is as before.
    """

    _before: tuple[int, Any] | None = None

    def __enter__(self) -> None:
        if parametrize._cache_enabled:
            self._before = parametrize._cache_enabled, parametrize._cache
            parametrize._cache_enabled, parametrize._cache = 0, {}

    def __exit__(self, *error: Any) -> None:
        if self._before is not None:
            parametrize._cache_enabled, parametrize._cache = self._before
            self._before = None
