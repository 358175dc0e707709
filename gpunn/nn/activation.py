"""The activation functions as modules: torch's own classes with gpunn's forward."""

from __future__ import annotations

import torch

import gpunn.functional as GF


class CELU(torch.nn.CELU):
    """``torch.nn.CELU`` on ``gpunn.functional.celu``, where the formula stands."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return GF.celu(input, self.alpha, self.inplace)


class ELU(torch.nn.ELU):
    """``torch.nn.ELU`` on ``gpunn.functional.elu``, where the formula stands."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return GF.elu(input, self.alpha, self.inplace)


class GELU(torch.nn.GELU):
    """``torch.nn.GELU`` on ``gpunn.functional.gelu``, where the formula stands."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return GF.gelu(input, self.approximate)


class Hardshrink(torch.nn.Hardshrink):
    """``torch.nn.Hardshrink`` on ``gpunn.functional.hardshrink``, where the formula stands."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return GF.hardshrink(input, self.lambd)


class Hardsigmoid(torch.nn.Hardsigmoid):
    """``torch.nn.Hardsigmoid`` on ``gpunn.functional.hardsigmoid``, where the formula stands."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return GF.hardsigmoid(input, self.inplace)


class Hardswish(torch.nn.Hardswish):
    """``torch.nn.Hardswish`` on ``gpunn.functional.hardswish``, where the formula stands."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return GF.hardswish(input, self.inplace)


class Hardtanh(torch.nn.Hardtanh):
    """``torch.nn.Hardtanh`` on ``gpunn.functional.hardtanh``, where the formula stands."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return GF.hardtanh(input, self.min_val, self.max_val, self.inplace)


class LeakyReLU(torch.nn.LeakyReLU):
    """``torch.nn.LeakyReLU`` on ``gpunn.functional.leaky_relu``, where the formula stands."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return GF.leaky_relu(input, self.negative_slope, self.inplace)


class LogSigmoid(torch.nn.LogSigmoid):
    """``torch.nn.LogSigmoid`` on ``gpunn.functional.logsigmoid``, where the formula stands."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return GF.logsigmoid(input)


class Mish(torch.nn.Mish):
    """``torch.nn.Mish`` on ``gpunn.functional.mish``, where the formula stands."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return GF.mish(input, self.inplace)


class ReLU(torch.nn.ReLU):
    """``torch.nn.ReLU`` on ``gpunn.functional.relu``, where the formula stands."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return GF.relu(input, self.inplace)


class ReLU6(torch.nn.ReLU6):
    """``torch.nn.ReLU6`` on ``gpunn.functional.relu6``, where the formula stands."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return GF.relu6(input, self.inplace)


class SELU(torch.nn.SELU):
    """``torch.nn.SELU`` on ``gpunn.functional.selu``, where the formula stands."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return GF.selu(input, self.inplace)


class Sigmoid(torch.nn.Sigmoid):
    """``torch.nn.Sigmoid`` on ``gpunn.functional.sigmoid``, where the formula stands."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return GF.sigmoid(input)


class SiLU(torch.nn.SiLU):
    """``torch.nn.SiLU`` on ``gpunn.functional.silu``, where the formula stands."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return GF.silu(input, self.inplace)


class Softplus(torch.nn.Softplus):
    """``torch.nn.Softplus`` on ``gpunn.functional.softplus``, where the formula stands."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return GF.softplus(input, self.beta, self.threshold)


class Softshrink(torch.nn.Softshrink):
    """``torch.nn.Softshrink`` on ``gpunn.functional.softshrink``, where the formula stands."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return GF.softshrink(input, self.lambd)


class Softsign(torch.nn.Softsign):
    """``torch.nn.Softsign`` on ``gpunn.functional.softsign``, where the formula stands."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return GF.softsign(input)


class Tanh(torch.nn.Tanh):
    """``torch.nn.Tanh`` on ``gpunn.functional.tanh``, where the formula stands."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return GF.tanh(input)


class Tanhshrink(torch.nn.Tanhshrink):
    """``torch.nn.Tanhshrink`` on ``gpunn.functional.tanhshrink``, where the formula stands."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return GF.tanhshrink(input)
