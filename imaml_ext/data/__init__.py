"""Sources of tasks."""

from imaml_ext.data.episodes import ImageEpisodes
from imaml_ext.data.mini_imagenet import load_mini_imagenet
from imaml_ext.data.omniglot import Omniglot, load_omniglot
from imaml_ext.data.regression import Sinusoid
from imaml_ext.data.similar_classes import SimilarClasses
from imaml_ext.data.tiny_imagenet import load_tiny_imagenet

__all__ = [
    "ImageEpisodes",
    "Omniglot",
    "SimilarClasses",
    "Sinusoid",
    "load_mini_imagenet",
    "load_omniglot",
    "load_tiny_imagenet",
]
