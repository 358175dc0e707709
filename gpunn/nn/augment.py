"""Augmentation as a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import gpunn.functional as GF
from gpunn.functional.augment_arguments import check_layout, dtype_of, settings_of, size_of


class Augment(torch.nn.Module):
    """``gpunn.functional.augment`` in training mode; in eval mode nothing is distorted.

    Has no parameters and nothing in the ``state_dict``.

    Args:
        size: as in the function, in eval mode too: an evaluated picture is resized whole.
        layout: as in the function, in eval mode too.
        dtype: as in the function, in eval mode too. With none of the three, pictures in eval mode
            are returned as they are.
        distortions: the function's other keywords, such as ``rotation=15``; but for the seed, which
            is drawn.

    Raises:
        TypeError: there is no keyword of that name, or its argument is not of its type.
        ValueError: an argument is out of its limits, a range upside down, or the result asked for
            in integers other than bytes.
    """

    def __init__(
        self,
        *,
        size: int | Sequence[int] | None = None,
        layout: str = "NCHW",
        dtype: torch.dtype | None = None,
        **distortions: Any,
    ) -> None:
        super().__init__()
        # Refuse what makes no sense before the first picture comes; bytes are the only pictures
        # whose own dtype a result may have without being of floating point.
        settings_of(**distortions)
        check_layout(layout)
        size_of(size, ())
        dtype_of(dtype, torch.uint8)
        self.size, self.layout, self.dtype = size, layout, dtype
        self.distortions = distortions

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        asked = self.distortions if self.training else {}
        if not self.training and (self.size, self.layout, self.dtype) == (None, "NCHW", None):
            return images
        return GF.augment(images, size=self.size, layout=self.layout, dtype=self.dtype, **asked)

    def extra_repr(self) -> str:
        given = {"size": self.size, "layout": self.layout, "dtype": self.dtype}
        default = {"size": None, "layout": "NCHW", "dtype": None}
        shown = {name: value for name, value in given.items() if value != default[name]}
        return ", ".join(f"{name}={value!r}" for name, value in (self.distortions | shown).items())
