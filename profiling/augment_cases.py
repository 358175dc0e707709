"""What is benchmarked of augmentation: a batch as a data loader has it, and small grey images."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F

import gpunn.functional as GF
from gpunn.functional.augment_arguments import settings_of
from gpunn.functional.augment_composition import draw, way_back
from gpunn.kernels.augment import COLOURS
from gpunn.profiling.case import Case, Mode, Tensors

SEED = 20240229
SHARES_OF_GREY = (0.2989, 0.587, 0.114)


def as_torch_counts(maps: list[torch.Tensor], height: int, width: int) -> torch.Tensor:
    """Maps of pixels as (N, 2, 3) of what affine_grid counts in: from -1 to 1, edge to edge."""
    a, b, c, d, e, f = maps
    x = a, b * height / width, (2 * c + 1 - width) / width
    y = d * width / height, e, (2 * f + 1 - height) / height
    return torch.stack([torch.stack(x, 1), torch.stack(y, 1)], 1)


@dataclass(frozen=True)
class Augmentation:
    """Pictures, and what PyTorch's way is given ready: maps (N, 2, 3), and factors (N, 3); dy."""

    name: str
    shape: tuple[int, int, int, int]
    asked: dict[str, Any] = field(hash=False)
    bytes_in: bool
    """Whether pictures are bytes, (N, H, W, C)."""
    mode: Mode = "forward"

    def make(self, device: torch.device, dtype: torch.dtype, seed: int) -> Tensors:
        n, c, height, width = self.shape
        given = (n, height, width, c) if self.bytes_in else self.shape
        maps, factors = torch.empty(n, 2, 3, device=device), torch.empty(n, 3, device=device)
        images = torch.empty(given, dtype=torch.uint8 if self.bytes_in else dtype, device=device)
        dy = [torch.empty(self.shape, dtype=dtype, device=device)] * (self.mode != "forward")
        if device.type == "meta":
            return images, maps, factors, *dy
        generator = torch.Generator(device).manual_seed(seed)
        colours = torch.rand(given, generator=generator, device=device)
        images.copy_(255 * colours if self.bytes_in else colours)
        drawn = draw(torch.tensor([SEED], device=device), n, settings_of(**self.asked))
        pixels = way_back(drawn, (height, width), (height, width))
        maps.copy_(as_torch_counts(pixels, height, width))
        factors.copy_(torch.stack([drawn[name] for name in COLOURS], 1))
        return images, maps, factors, *(part.normal_(generator=generator) for part in dy)

    def ours(self, images: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        """Draws the parameters that PyTorch's way is given."""
        if not self.bytes_in:
            return GF.augment(images, seed=SEED, **self.asked)
        return GF.augment(images, seed=SEED, layout="NHWC", dtype=torch.float32, **self.asked)

    def theirs(
        self, images: torch.Tensor, maps: torch.Tensor, factors: torch.Tensor, *_: torch.Tensor
    ) -> torch.Tensor:
        """affine_grid, grid_sample, and the formulas of ColorJitter, in float32."""
        pixels = images.permute(0, 3, 1, 2) / 255 if self.bytes_in else images.float()
        grid = F.affine_grid(maps, list(pixels.shape), align_corners=False)
        y = F.grid_sample(pixels, grid, align_corners=False)
        if "brightness" in self.asked:
            brightness, contrast, saturation = factors[:, :, None, None, None].unbind(1)
            y = (brightness * y).clamp(0, 1)
            y = (contrast * y + (1 - contrast) / 2).clamp(0, 1)
            shares = torch.tensor(SHARES_OF_GREY, device=y.device)[:, None, None]
            grey = (shares * y).sum(1, keepdim=True)
            y = (saturation * y + (1 - saturation) * grey).clamp(0, 1)
        return y if self.bytes_in else y.to(images.dtype)

    def bytes(self) -> int:
        """Of bytes in and float32 out, or of bfloat16; of a gradient, dy and dx."""
        n = torch.Size(self.shape).numel()
        return 5 * n if self.bytes_in else 4 * n

    def case(self) -> Case:
        suffix = {"forward": "", "backward": ": dx"}[self.mode]
        n, c, height, width = self.shape
        small = min(n, 3), c, min(height, 28), min(width, 28)
        return Case(
            op="augment",
            name=self.name + suffix,
            shapes=" × ".join(map(str, self.shape)),
            make=self.make,
            ours=self.ours,
            theirs=self.theirs,
            bytes=self.bytes(),
            flops=0,
            small=lambda: replace(self, shape=small).case(),
            dtype=torch.float32 if self.bytes_in else torch.bfloat16,
            mode=self.mode,
            reads_all=False,
            wanted=(0,) if self.mode != "forward" else (),
        )


def augment_cases() -> list[Case]:
    """ImageNet's crops, flips and colours; digits turned and moved, and their gradient."""
    crops: dict[str, Any] = {
        "horizontal_flip": 0.5,
        "crop_area": (0.08, 1.0),
        "brightness": 0.4,
        "contrast": 0.4,
        "saturation": 0.4,
    }
    turns: dict[str, Any] = {"rotation": 15, "scale": (0.9, 1.1), "translation_x": 0.1}
    specs = [
        Augmentation("crop, flip, colours, bytes to float32", (256, 3, 224, 224), crops, True),
        Augmentation("rotation, scale, translation", (512, 1, 28, 28), turns, False),
        Augmentation("rotation, scale, translation", (512, 1, 28, 28), turns, False, "backward"),
        Augmentation("rotation, scale, translation", (256, 3, 224, 224), turns, False, "backward"),
    ]
    return [spec.case() for spec in specs]
