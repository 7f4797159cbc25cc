"""What the adapters of ADM's U-Net share: keys of a recipe, and the network that the shapes in a file tell.

Shapes tell all but the side of the images, the heads of attention and the order of queries, keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from teachers.adapters.base import Foreign
from teachers.checkpoints import Checkpoint
from teachers.errors import CheckpointError
from teachers.fields import FieldError
from teachers.networks.adm_unet import ADMUNetConfig, Order, Resample
from teachers.space import DataSpace


@dataclass(frozen=True, kw_only=True)
class UNet(Foreign):
    """Of both. size: the side of its images; heads: of each attention, or head_width: the width of each; null for those
    of the networks that its authors publish."""

    size: int | None = None
    heads: int | None = None
    head_width: int | None = None
    attention_order: Literal["legacy", "new"] | None = None


@dataclass(frozen=True)
class Published:
    """A network that a family's authors train, by what the shapes tell, and what they do not; None: differs."""

    width: int
    widths: tuple[int, ...]
    blocks: int
    attention: tuple[int, ...]
    size: int | None
    heads: int = 1
    head_width: int | None = None


def network_of(
    config: UNet, checkpoint: Checkpoint, order: Order, null_class: bool, published: tuple[Published, ...]
) -> tuple[ADMUNetConfig, DataSpace]:
    """The network in a file, and what it makes: pixels in [-1, 1]. order: of its family; null_class: whether the last
    row of a table of classes means "none".

    Raises CheckpointError for what is no such network, FieldError for keys that neither shapes nor `published` answer.
    """
    width = checkpoint.shape("time_embed.0.weight", 2)[1]
    entering, leaving = checkpoint.shape("input_blocks.0.0.weight", 4)[1], checkpoint.shape("out.2.weight", 4)[0]
    if entering != leaving:
        raise CheckpointError(
            f"{checkpoint.source}: {entering} channels enter and {leaving} leave, so it is no velocity alone (but a "
            "learned variance, a discrete flow, or one of features of the image); name another checkpoint"
        )
    resample, levels = _levels(checkpoint)
    each = checkpoint.count("input_blocks.") // levels
    widths = tuple(checkpoint.shape(f"input_blocks.{1 + each * i}.0.out_layers.3.weight")[0] for i in range(levels))
    attention = tuple(i for i in range(levels) if f"input_blocks.{1 + each * i}.1.qkv.weight" in checkpoint.tensors)
    known = [p for p in published if (p.width, p.widths, p.blocks, p.attention) == (width, widths, each - 1, attention)]
    size, heads, head_width = _unseen(config, checkpoint, known[0] if known else None)
    rows = checkpoint.shape("label_emb.weight", 2)[0] if "label_emb.weight" in checkpoint.tensors else None
    network = ADMUNetConfig(
        width=width,
        widths=widths,
        blocks=each - 1,
        attention=attention,
        heads=heads,
        head_width=head_width,
        order=config.attention_order or order,
        scale_shift=checkpoint.shape("input_blocks.1.0.emb_layers.1.weight")[0] == 2 * widths[0],
        resample=resample,
        null_class=null_class and rows is not None,
    )
    classes = None if rows is None else rows - network.null_class
    return network, DataSpace((entering, size, size), classes, (-1.0, 1.0))


def _levels(checkpoint: Checkpoint) -> tuple[Resample, int]:
    """How it is resampled, and how many levels there are: pooling leaves a number without weights."""
    numbers = range(checkpoint.count("input_blocks."))
    held = {name.split(".")[1] for name in checkpoint.tensors if name.startswith("input_blocks.")}
    found: dict[Resample, int] = {
        "conv": sum(f"input_blocks.{i}.0.op.weight" in checkpoint.tensors for i in numbers),
        "pool": sum(str(i) not in held for i in numbers),
        "block": sum(
            f"output_blocks.{i}.{j}.in_layers.2.weight" in checkpoint.tensors for i in numbers for j in (1, 2)
        ),
    }
    resample = max(found, key=lambda how: found[how])
    levels = 1 + found[resample]
    if len(numbers) % levels or len(numbers) < 2 * levels:
        raise CheckpointError(
            f"{checkpoint.source}: its {len(numbers)} input_blocks do not make {levels} levels of the same length; it "
            "is damaged, or not of this family: distill ls --teachers"
        )
    return resample, levels


def _unseen(config: UNet, checkpoint: Checkpoint, published: Published | None) -> tuple[int, int, int | None]:
    size = config.size or (published.size if published else None)
    given = config.heads is not None or config.head_width is not None
    missing = {}
    if size is None:
        missing["size"] = f"is needed: {checkpoint.source} does not say the side of its images"
    if not given and published is None:
        missing["heads"] = (
            f"is needed, or head_width: {checkpoint.source} does not say them, and it is none of the published networks"
        )
    if config.heads is not None and config.head_width is not None:
        missing["heads"] = "says the same as head_width: give one of them"
    if missing or size is None:
        raise FieldError(type(config).__name__, missing)
    if given or published is None:
        return size, config.heads or 1, config.head_width
    return size, published.heads, published.head_width
