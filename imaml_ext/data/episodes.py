"""Few-shot classification tasks sampled from one tensor of images."""

from copy import copy

import torch
from torch import Tensor

from imaml_ext._checks import check_integer, check_range
from imaml_ext._random import random_bits, uniform
from imaml_ext.data.similar_classes import SimilarClasses
from imaml_ext.data.tasks import TaskBatch

_CLASSES, _IMAGES, _ROTATIONS, _HARD, _GROUPS, _MEMBERS = range(6)  # streams of random numbers


class ImageEpisodes:
    """`way`-way `shot`-shot tasks with `query` query images per class; labels are 0 to way - 1.

    A `ShardableSource`, since a task is a function of (seed, step, its index), and a
    `RecordableSource`, since tasks are sampled on the device of the images.

    Args:
        images: uint8 [classes, images per class, H, W] or
            [classes, images per class, channels, H, W].
        way: number of classes in a task.
        shot, query: images per class in the support and the query set.
        tasks: number of tasks in a batch, B.
        seed: determines the tasks.
        rotate: rotate each class of a task by 0, 90, 180 or 270 degrees, at random.
        dtype: dtype of the sampled images, which are scaled to [0, 1].

    Raises:
        TypeError: a size is not an integer.
        ValueError: more ways than classes, shot + query above the images per class, a size below 1,
            or `images` of another dtype or shape.
    """

    recordable = True

    def __init__(
        self,
        images: Tensor,
        *,
        way: int,
        shot: int,
        query: int,
        tasks: int,
        seed: int = 0,
        rotate: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if images.dim() not in (4, 5) or images.dtype != torch.uint8:
            raise ValueError(
                "images must be uint8 [classes, images, H, W] or [classes, images, channels, H, W],"
                f" got {images.dtype} {list(images.shape)}"
            )
        for name, value in (("way", way), ("shot", shot), ("query", query), ("tasks", tasks)):
            check_integer(name, value, minimum=1)
        if way > images.shape[0]:
            raise ValueError(f"way={way}, but there are {images.shape[0]} classes")
        if shot + query > images.shape[1]:
            raise ValueError(
                f"shot={shot} and query={query} need {shot + query} images per class, "
                f"but there are {images.shape[1]}"
            )
        self.images = images if images.dim() == 5 else images[:, :, None]
        self.way, self.shot, self.query, self.tasks = way, shot, query, tasks
        self.seed, self.rotate, self.dtype = seed, rotate, dtype
        self.task_indices = range(tasks)
        self.similar: SimilarClasses | None = None
        self.hard = 0.0

    def sample(self, step: int | Tensor) -> TaskBatch:
        """Support and query (x [B, N, channels, H, W], y [B, N]), N = way shot and way query."""
        classes, per_class = self.images.shape[:2]
        count = self.shot + self.query
        rows = self._bits(step, _CLASSES, classes).topk(self.way).indices
        turns = self._bits(step, _ROTATIONS, self.way) % 4 if self.rotate else None
        if self.similar is not None:
            rows, turns = self._some_hard(step, rows, turns)
        columns = self._bits(step, _IMAGES, self.way, per_class).topk(count).indices
        x = self.images[rows[..., None], columns]  # [B, way, count, channels, H, W]
        if turns is not None:
            each = turns[..., None, None, None, None]
            for k in (1, 2):  # quarter and half turns compose to 0 to 3 quarters
                x = torch.where(each & k != 0, torch.rot90(x, k, (-2, -1)), x)
        x = x.to(self.dtype) / 255
        y = torch.arange(self.way, device=x.device).expand(self.tasks, -1)

        def examples(start: int, count: int) -> tuple[Tensor, Tensor]:
            images = x[:, :, start : start + count].flatten(1, 2)
            return images, y.repeat_interleave(count, dim=1)

        return TaskBatch(support=examples(0, self.shot), query=examples(self.shot, self.query))

    def _some_hard(
        self, step: int | Tensor, rows: Tensor, turns: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Classes and turns [B, way], of which some tasks' are replaced by those of one group."""
        assert self.similar is not None
        groups = self.similar.groups
        group = self._bits(step, _GROUPS, 1)[:, 0] % len(groups)
        members = self._bits(step, _MEMBERS, groups.shape[1]).topk(self.way).indices
        classes, quarters = self.similar.decode(groups[group].gather(1, members))
        is_hard = uniform(self._bits(step, _HARD, 1)) < self.hard
        rows = torch.where(is_hard, classes, rows)
        return rows, None if turns is None else torch.where(is_hard, quarters, turns)

    def with_similar(self, similar: SimilarClasses, hard: float = 0.5) -> "ImageEpisodes":
        """A source of which some tasks are hard: their classes are similar. Shares the images.

        Args:
            similar: groups of at least `way` similar classes of these images.
            hard: probability that the classes of a task are drawn from one group.

        Raises:
            TypeError: `hard` is not a number.
            ValueError: the groups are too small, or of other images, or have rotated classes that
                this source does not rotate; or `hard` is not in [0, 1].
        """
        check_range("hard", hard, "[0, 1]")
        similar.check(self.images.shape[0], way=self.way, rotate=self.rotate)
        source = copy(self)
        source.similar, source.hard = similar, hard
        return source

    def shard(self, tasks: range) -> "ImageEpisodes":
        """A source of these tasks of each batch; shares the images."""
        shard = copy(self)
        shard.task_indices = self.task_indices[tasks.start : tasks.stop]
        shard.tasks = len(tasks)
        return shard

    def _bits(self, step: int | Tensor, stream: int, *shape: int) -> Tensor:
        return random_bits(self.seed, step, stream, self.task_indices, shape, self.images.device)
