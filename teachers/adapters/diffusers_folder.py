"""What lies in a folder that diffusers saved: which network, its config, scheduler, autoencoder and licence."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from teachers.checkpoints import read
from teachers.errors import CheckpointError
from teachers.networks.diffusers import completed
from teachers.space import Latent

PARTS = ("transformer", "unet")
_NAMES = r"turbo|schnell|lightning|lcm|latent.?consistency|sprint|anyflow|hyper.?sd|dmd"
_DISTILLED = re.compile(rf"(?<![a-z])({_NAMES})(?![a-z])", re.IGNORECASE)
_FEW_STEPS = ("LCMScheduler", "SCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler")


@dataclass(frozen=True)
class Folder:
    """root: of the pipeline (model_index.json); part: of the network (config.json and its weights)."""

    root: Path
    part: Path

    @classmethod
    def at(cls, path: Path, weights: str | None) -> Folder:
        """`path` is the pipeline's folder or the network's; weights may name another folder of the network. Raises
        CheckpointError."""
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such folder; name the folder that diffusers saved")
        if (path / "config.json").is_file() and not (path / "model_index.json").is_file():
            whole = any((path.parent / name).exists() for name in ("model_index.json", "scheduler"))
            return cls(path.parent if whole else path, path)
        if (path / "transformer_2").is_dir() and weights not in ("transformer", "transformer_2"):
            raise CheckpointError(
                f"{path}: has two networks, one for early and one for late times; a teacher is one of them: "
                "weights: transformer (early) or transformer_2 (late)"
            )
        averaged = (f"{part}_ema" for part in PARTS)
        for part in (*([weights] if weights else []), *averaged, *PARTS):
            if (path / part / "config.json").is_file():
                return cls(path, path / part)
        there = ", ".join(sorted(p.name for p in path.iterdir())[:12]) or "nothing"
        raise CheckpointError(
            f"{path}: not a folder of diffusers: no {' and no '.join(f'{p}/config.json' for p in PARTS)} (it holds "
            f"{there}); save it with save_pretrained, or name the family it is of: distill ls --teachers"
        )

    @cached_property
    def _config(self) -> Mapping[str, Any]:
        return _json(self.part / "config.json")

    @property
    def name(self) -> str:
        """The class of the network."""
        return str(self._config.get("_class_name"))

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The arguments that it is built with."""
        return {key: value for key, value in self._config.items() if not key.startswith("_")}

    @cached_property
    def index(self) -> Mapping[str, Any]:
        """model_index.json, or nothing."""
        return _json(self.root / "model_index.json", {})

    @cached_property
    def scheduler(self) -> Mapping[str, Any]:
        """The scheduler's config with what it leaves out, or nothing."""
        return completed(_json(self.root / "scheduler" / "scheduler_config.json", {}))

    @cached_property
    def vae(self) -> Mapping[str, Any]:
        """The autoencoder's config with what it leaves out, or nothing."""
        name = "vqvae" if (self.root / "vqvae").is_dir() else "vae"
        return completed(_json(self.root / name / "config.json", {}))

    @property
    def latent(self) -> Latent | None:
        """What of the autoencoder's raw latents the network works on; None without an autoencoder."""
        vae = self.vae
        if not vae:
            return None
        name = vae.get("_name_or_path") or f"{vae.get('_class_name')} of {self.root.name}"
        mean, std, scale = vae.get("latents_mean"), vae.get("latents_std"), vae.get("scaling_factor")
        numbers = {"scaling_factor": scale, "shift_factor": vae.get("shift_factor")}
        if off := [name for name, value in numbers.items() if value is not None and not isinstance(value, int | float)]:
            raise CheckpointError(f"{self.root / 'vae' / 'config.json'}: {off[0]} is {numbers[off[0]]!r}, no number; "
                                  "copy it again")  # fmt: skip
        scale = 1.0 if scale is None else float(scale)
        if vae.get("_class_name") == "AutoencoderKLFlux2":  # normalised by what its batch norm saw
            seen = read(str(self.root / "vae")).tensors
            if missing := [f"bn.running_{n}" for n in ("mean", "var") if f"bn.running_{n}" not in seen]:
                raise CheckpointError(f"{self.root / 'vae'}: has no {', '.join(missing)}; copy it again")
            mean = seen["bn.running_mean"].tolist()
            std = (seen["bn.running_var"] + vae["batch_norm_eps"]).sqrt().tolist()
        if mean is not None and std is not None:
            return Latent(autoencoder=name, scale=scale, mean=tuple(mean), std=tuple(std))
        return Latent(autoencoder=name, scale=scale, shift=float(vae.get("shift_factor") or 0.0))

    @property
    def reduction(self) -> int | None:
        """How many pixels a latent's side has, by the autoencoder's config."""
        blocks = self.vae.get("block_out_channels") or self.vae.get("encoder_block_out_channels")
        return None if blocks is None else 2 ** (len(blocks) - 1)

    def weights(self, variant: str | None) -> Path:
        """The file of the network's weights, or the index of its shards. Raises CheckpointError."""
        mark = f".{variant}" if variant and variant != self.part.name else ""
        stem = "diffusion_pytorch_model"
        for name in (f"{stem}.safetensors.index{mark}.json", f"{stem}{mark}.safetensors"):
            if (self.part / name).is_file():
                return self.part / name
        if mark:
            there = ", ".join(sorted(p.name for p in self.part.iterdir())[:12])
            raise CheckpointError(f"{self.part}: has no weights of the variant {variant} (it holds {there})")
        return self.part

    @property
    def few_steps(self) -> str | None:
        """What shows that the model was distilled to few steps already; None if nothing does."""
        if self._config.get("time_cond_proj_dim") is not None:
            return "its UNet has time_cond_proj_dim, as latent consistency models do"
        if self.scheduler.get("_class_name") in _FEW_STEPS:
            return f"its scheduler is {self.scheduler['_class_name']}"
        if self.name == "SanaTransformer2DModel" and self._config.get("guidance_embeds"):
            return "its Sana embeds a scale of guidance, as SanaSprint does"
        static = self.scheduler and not self.scheduler.get("use_dynamic_shifting")
        if self.name == "FluxTransformer2DModel" and not self._config.get("guidance_embeds") and static:
            return "its Flux embeds no guidance and its grid is not shifted, as FLUX.1-schnell's"
        names = (self.index.get("_class_name"), self.index.get("_name_or_path"), self._config.get("_name_or_path"))
        found = next((text for text in (*names, self.root.name) if text and _DISTILLED.search(_words(text))), None)
        return None if found is None else f"it is named {found}"

    @property
    def licence(self) -> str | None:
        """Of the model card, README.md."""
        card = self.root / "README.md"
        if not card.is_file():
            return None
        head = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
        said = dict(re.findall(r"^(license|license_name):\s*(\S.*?)\s*$", head[1], re.MULTILINE)) if head else {}
        return said.get("license_name") if said.get("license") == "other" else said.get("license")


def _words(name: str) -> str:
    """SanaSprintPipeline -> Sana-Sprint-Pipeline."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name)


def _json(file: Path, missing: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
    if missing is not None and not file.is_file():
        return missing
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON ({error}); copy it again") from None
    if not isinstance(held, dict):
        raise CheckpointError(f"{file}: is no JSON object; copy it again")
    return held
