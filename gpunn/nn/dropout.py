"""Dropout as modules, with torch's arguments."""

from __future__ import annotations

import torch

import gpunn.functional as GF


class Dropout(torch.nn.Dropout):
    """``torch.nn.Dropout`` on ``gpunn.functional.dropout``; forward takes its ``mask``, too."""

    def forward(self, input: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return GF.dropout(input, self.p, self.training, self.inplace, mask=mask)


class Dropout1d(torch.nn.Dropout1d):
    """``torch.nn.Dropout1d`` on ``gpunn.functional.dropout1d``."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return GF.dropout1d(input, self.p, self.training, self.inplace)


class Dropout2d(torch.nn.Dropout2d):
    """``torch.nn.Dropout2d`` on ``gpunn.functional.dropout2d``."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return GF.dropout2d(input, self.p, self.training, self.inplace)


class Dropout3d(torch.nn.Dropout3d):
    """``torch.nn.Dropout3d`` on ``gpunn.functional.dropout3d``."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return GF.dropout3d(input, self.p, self.training, self.inplace)


class AlphaDropout(torch.nn.AlphaDropout):
    """``torch.nn.AlphaDropout`` on ``gpunn.functional.alpha_dropout``.

    As torch's, it does not write in place whatever ``inplace`` says.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return GF.alpha_dropout(input, self.p, self.training)


class FeatureAlphaDropout(torch.nn.FeatureAlphaDropout):
    """``torch.nn.FeatureAlphaDropout`` on ``gpunn.functional.feature_alpha_dropout``.

    As torch's, it does not write in place whatever ``inplace`` says.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return GF.feature_alpha_dropout(input, self.p, self.training)
