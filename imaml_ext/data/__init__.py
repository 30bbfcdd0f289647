"""Sources of tasks."""

from imaml_ext.data.episodes import ImageEpisodes
from imaml_ext.data.omniglot import Omniglot, load_omniglot
from imaml_ext.data.regression import Sinusoid

__all__ = ["ImageEpisodes", "Omniglot", "Sinusoid", "load_omniglot"]
