"""Which classes are hard to tell apart: the nearest neighbours of each in a space of features."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from imaml_ext._checks import check_integer


@dataclass(frozen=True)
class SimilarClasses:
    """Groups of similar classes, from which `ImageEpisodes` draws hard tasks.

    Attributes:
        groups: int64 [groups, size]; entry `turns * classes + c` is class c, rotated by `turns`
            quarter turns. A group has no class twice.
        classes: number of classes of the images.
    """

    groups: Tensor
    classes: int

    @staticmethod
    @torch.no_grad()
    def nearest(
        images: Tensor,
        features: Callable[[Tensor], Tensor],
        *,
        neighbours: int,
        rotate: bool = False,
        examples: int = 10,
    ) -> "SimilarClasses":
        """Each class with its nearest neighbours, by the cosine between class means of features.

        Args:
            images: uint8 [classes, images per class, channels, H, W].
            features: maps [classes, channels, H, W] in [0, 1], one image of each class, to
                [classes, d].
            neighbours: in each group, besides the class itself.
            rotate: whether each of the four rotations of a class is the centre of a group; as a
                neighbour, a class appears in its most similar rotation.
            examples: images per class in a mean.

        Raises:
            TypeError: a number is not an integer.
            ValueError: `neighbours` is not in [1, classes), or `examples` is below 1.
        """
        classes = images.shape[0]
        check_integer("neighbours", neighbours, minimum=1)
        check_integer("examples", examples, minimum=1)
        if neighbours >= classes:
            raise ValueError(f"neighbours={neighbours}, but there are {classes} classes")
        each = []
        for turn in range(4 if rotate else 1):
            turned = torch.rot90(images[:, :examples], turn, (-2, -1)).float() / 255
            each.append(torch.stack([features(x) for x in turned.unbind(1)]).mean(0))
        means = torch.stack(each)  # [turns, classes, d]
        means = means - means.mean((0, 1))
        means = means / means.norm(dim=-1, keepdim=True)
        groups = []
        for turn, centres in enumerate(means):
            cosines, quarters = (centres @ means.mT).max(0)  # [classes, classes]
            itself = torch.arange(classes, device=images.device)
            cosines[itself, itself], quarters[itself, itself] = torch.inf, turn
            nearest = cosines.topk(1 + neighbours).indices
            groups.append(quarters.gather(1, nearest) * classes + nearest)
        return SimilarClasses(torch.cat(groups), classes)

    def decode(self, entries: Tensor) -> tuple[Tensor, Tensor]:
        """The classes and the quarter turns of entries of `groups`."""
        return entries % self.classes, entries // self.classes

    def check(self, classes: int, *, way: int, rotate: bool) -> None:
        """Raises ValueError if tasks of `way` of these classes cannot be drawn from the groups."""
        if classes != self.classes:
            raise ValueError(f"similar has groups of {self.classes} classes, images of {classes}")
        if way > self.groups.shape[1]:
            raise ValueError(f"way={way}, but the groups have {self.groups.shape[1]} classes")
        if not rotate and bool((self.groups >= classes).any()):
            raise ValueError("similar has rotated classes: pass rotate=True")
