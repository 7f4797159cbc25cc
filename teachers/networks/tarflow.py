"""TarFlow: a normalizing flow of causal transformers over patches, under the names of its checkpoints.

    forth, all patches at once:   z_i = (x_i - b(x_<i)) exp(-a(x_<i))
    back, one patch after another: x_i = z_i exp(a(x_<i)) + b(x_<i)

in each block, the order of the patches reversed in every other one. Guidance is inside of the way back: a and b of each
patch are moved away from those without conditioning. Models are trained on data with Gaussian noise of a known size,
which one step of Tweedie's formula takes off again. It has no velocity. Zhai et al., arXiv 2412.06329.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from teachers.networks.dit import patchify, unpatchify

Push = Callable[[int, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Number of the patch from 0, a and b with conditioning, a and b without -> a and b."""


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, h: Tensor, kept: Tensor | None = None, at: int = 0, temperature: float = 1.0) -> Tensor:
        """``h: [b, tokens, width]``, causal; or, with the keys and values of the tokens before in ``kept: [2, b, heads,
        tokens, width / heads]``, one token ``[b, 1, width]`` in place `at`, whose own are put there."""
        query, key, value = self.qkv(self.norm(h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        if kept is not None:
            kept[:, :, :, at] = torch.stack([key, value])[:, :, :, 0]
            key, value = kept[:, :, :, : at + 1].unbind()
        attended = nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=kept is None, scale=query.shape[-1] ** -0.5 / temperature
        )
        return self.proj(attended.transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.main = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, h: Tensor) -> Tensor:
        return self.main(self.norm(h))


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = _Attention(width, heads)
        self.mlp = _Mlp(width)

    def forward(self, h: Tensor, kept: Tensor | None = None, at: int = 0, temperature: float = 1.0) -> Tensor:
        h = h + self.attention(h, kept, at, temperature)
        return h + self.mlp(h)


class _Block(nn.Module):
    """One invertible map of patches ``[b, tokens, features]``, in the order of the patches or, `turned`, from the last
    to the first. scales: whether there is an a, or b alone."""

    def __init__(
        self, features: int, tokens: int, width: int, layers: int, heads: int, classes: int, scales: bool, turned: bool
    ) -> None:
        super().__init__()
        self.heads, self.scales, self.turned = heads, scales, turned
        self.proj_in = nn.Linear(features, width)
        self.pos_embed = nn.Parameter(torch.zeros(tokens, width))
        self.class_embed = nn.Parameter(torch.zeros(classes, 1, width)) if classes else None
        self.attn_blocks = nn.ModuleList(_Layer(width, heads) for _ in range(layers))
        self.proj_out = nn.Linear(width, 2 * features if scales else features)

    def _embedding(self, label: Tensor | None) -> Tensor:
        """Of the place of each patch, in the order of this block, and of the class: without a label, of their mean.
        ``[b or 1, tokens, width]``."""
        place = self.pos_embed.flip(0) if self.turned else self.pos_embed
        if self.class_embed is None:
            return place[None]
        return place + (self.class_embed.mean(0, keepdim=True) if label is None else self.class_embed[label])

    def _ends(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """a and b."""
        out = self.proj_out(h)
        a, b = out.chunk(2, dim=-1) if self.scales else (torch.zeros_like(out), out)
        return a, b

    def forward(self, x: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor]:
        """z, and the logarithm of the determinant of dz/dx ``[b]``."""
        x = x.flip(1) if self.turned else x
        h = self.proj_in(x) + self._embedding(label)
        for layer in self.attn_blocks:
            h = layer(h)
        # patch i is transformed by what was said after those before it, the first by nothing
        a, b = (torch.cat([torch.zeros_like(v[:, :1]), v[:, :-1]], dim=1) for v in self._ends(h))
        z = (x - b) * (-a).exp()
        return z.flip(1) if self.turned else z, -a.sum((1, 2))

    def back(self, z: Tensor, label: Tensor | None, push: Push | None, temperature: float) -> Tensor:
        """x, patch by patch; no gradient. `push` guides, away from the same network without a label and at another
        temperature of its attention."""
        z = z.flip(1) if self.turned else z
        x, tokens = z.clone(), z.shape[1]
        ways = [(self._embedding(label), 1.0), *([(self._embedding(None), temperature)] if push else [])]
        kept = [[self._empty(z) for _ in self.attn_blocks] for _ in ways]
        for i in range(tokens - 1):
            said: list[Tensor] = []
            for (embedding, heat), memory in zip(ways, kept, strict=True):
                h = self.proj_in(x[:, i : i + 1]) + embedding[:, i : i + 1]
                for layer, own in zip(self.attn_blocks, memory, strict=True):
                    h = layer(h, own, i, heat)
                said += [v[:, 0] for v in self._ends(h)]
            a, b = push(i, said[0], said[1], said[2], said[3]) if push else (said[0], said[1])
            x[:, i + 1] = z[:, i + 1] * a.exp() + b
        return x.flip(1) if self.turned else x

    def _empty(self, z: Tensor) -> Tensor:
        """For keys and values of one layer."""
        return z.new_empty(2, len(z), self.heads, z.shape[1], self.proj_in.out_features // self.heads)


class TarFlow(nn.Module):
    """Images ``[b, *shape]`` <-> noise of that shape. `var`, by patch, is the variance of that noise where the blocks
    have no scales."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        patch: int,
        width: int,
        depth: int,
        layers: int,
        heads: int,
        classes: int = 0,
        scales: bool = True,
    ) -> None:
        super().__init__()
        self.shape, self.patch = shape, patch
        channels, rows, columns = shape
        features, tokens = channels * patch**2, rows * columns // patch**2
        self.blocks = nn.ModuleList(
            _Block(features, tokens, width, layers, heads, classes, scales, turned=number % 2 == 1)
            for number in range(depth)
        )
        self.var: Tensor
        self.register_buffer("var", torch.ones(tokens, features))

    def forward(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The noise z ``[b, *shape]`` of an image, and the logarithm of the determinant of dz/dx ``[b]``."""
        z, volume = patchify(x, self.patch), x.new_zeros(len(x))
        for block in self.blocks:
            z, grown = block(z, label)
            volume = volume + grown
        return unpatchify(z, self.shape, self.patch), volume

    @torch.no_grad()
    def back(
        self, z: Tensor, label: Tensor | None = None, push: Push | None = None, temperature: float = 1.0
    ) -> Tensor:
        """The image of noise z of variance 1; one forward of the blocks, a patch at a time. See `_Block.back`."""
        x = patchify(z, self.patch) * self.var.sqrt()
        for number in reversed(range(len(self.blocks))):
            x = self.blocks[number].back(x, label, push, temperature)  # type: ignore[operator]
        return unpatchify(x, self.shape, self.patch)

    def score(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """grad log p(x) ``[b, *shape]``, p the law of the noisy images; of noise of variance 1, as the models are
        trained. Frozen networks alone: gradients are taken to x."""
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            z, volume = self(x, label)
            log = volume.sum() - 0.5 * z.square().sum()
            (found,) = torch.autograd.grad(log, x)
        return found
