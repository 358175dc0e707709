"""What is benchmarked of attention: training, packed sequences, and decoding from a cache.

Operations are counted as FlashAttention's papers do: 4 a pair and column of a head, half of them
where attention is causal, and 2.5 times as many for the gradients.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import gpunn.functional as GF
from gpunn.profiling.case import Case, Function, Mode, Tensors, normal

SUFFIXES: dict[Mode, str] = {"forward": "", "backward": ": dq, dk, dv", "step": ": step"}
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def work(
    mode: Mode, n_query: int, n_keys: int, n_y: int, n_products: int, integers: int = 0
) -> tuple[int, int]:
    """Bytes in bfloat16, and operations, from the sizes of q, of k with v, and of y."""
    forward = 2 * (n_query + n_keys + n_y) + integers
    backward = 2 * (2 * n_y + 2 * (n_query + n_keys)) + integers
    return {
        "forward": (forward, n_products),
        "backward": (backward, 5 * n_products // 2),
        "step": (forward + backward, 7 * n_products // 2),
    }[mode]


def by_backend(
    backend: SDPBackend, causal: bool, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """torch's attention by one of its backends; an error where that does not take it."""
    grouped = q.shape[1] != k.shape[1]
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)


@cache
def compiled_flex() -> Callable[..., Any]:
    """FlexAttention as it is meant to be used, compiled."""
    return torch.compile(flex_attention, dynamic=False)


@cache
def causal_blocks(length: int, device: torch.device) -> Any:
    """FlexAttention's mask, which a model makes once for all its layers."""
    return create_block_mask(
        lambda batch, head, row, column: row >= column, None, None, length, length, device
    )


def by_flex(causal: bool, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """torch's FlexAttention."""
    mask = causal_blocks(q.shape[2], q.device) if causal else None
    grouped = q.shape[1] != k.shape[1]
    y: torch.Tensor = compiled_flex()(q, k, v, block_mask=mask, enable_gqa=grouped)
    return y


def rivals_of(causal: bool) -> dict[str, Function]:
    """Every backend of torch's attention by itself, and FlexAttention; of q, k and v."""
    rivals: dict[str, Function] = {
        name: partial(by_backend, backend, causal) for name, backend in BACKENDS.items()
    }
    return {**rivals, "flex": partial(by_flex, causal)}


@dataclass(frozen=True)
class Attention:
    """Self-attention; the inputs are q, k, v and, for gradients, dy."""

    head: int
    length: int
    causal: bool
    mode: Mode = "forward"
    batch: int = 0
    """So many that there are 16384 tokens, if 0."""
    n_heads: int = 0
    """So many that all are 2048 wide, if 0."""
    n_key_heads: int = 0
    """As many as there are of the query, if 0."""

    def sizes(self) -> tuple[int, int, int]:
        """Batch, heads and key heads."""
        n_heads = self.n_heads or 2048 // self.head
        return self.batch or 16384 // self.length, n_heads, self.n_key_heads or n_heads

    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of q, and of k and v."""
        batch, n_heads, n_key_heads = self.sizes()
        rest = self.length, self.head
        return (batch, n_heads, *rest), (batch, n_key_heads, *rest)

    @property
    def grouped(self) -> bool:
        """Whether several query heads share a key head."""
        _, n_heads, n_key_heads = self.sizes()
        return n_heads != n_key_heads

    def ours(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = GF.scaled_dot_product_attention(
            q, k, v, is_causal=self.causal, enable_gqa=self.grouped
        )
        return y

    def theirs(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """By the backend that torch itself chooses."""
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=self.causal, enable_gqa=self.grouped
        )

    def reduced(self) -> Attention:
        """The same for few heads and short sequences."""
        n_key_heads = 1 if self.grouped else 2
        return replace(self, batch=1, length=40, n_heads=2, n_key_heads=n_key_heads)

    def case(self) -> Case:
        (q, k), (batch, n_heads, n_key_heads) = self.shapes(), self.sizes()
        n, n_k = torch.Size(q).numel(), torch.Size(k).numel()
        products = 4 * n * self.length // (2 if self.causal else 1)
        n_bytes, flops = work(self.mode, n, 2 * n_k, n, products)
        which = "causal" if self.causal else "all pairs"
        heads = f"{n_heads} × {self.head}" + f" over {n_key_heads}" * self.grouped
        return Case(
            op="attention",
            name=f"{which}{', grouped heads' * self.grouped}{SUFFIXES[self.mode]}",
            shapes=f"{batch} × {self.length}, {heads}",
            make=normal(q, k, k, *[q] * (self.mode != "forward")),
            ours=self.ours,
            theirs=self.theirs,
            rivals=rivals_of(self.causal),
            bytes=n_bytes,
            flops=flops,
            small=lambda: self.reduced().case(),
            mode=self.mode,
            wanted=(0, 1, 2) if self.mode != "forward" else (),
        )


LENGTHS = [4096, *[2048] * 2, *[1024] * 4, *[256] * 8, *[128] * 16]
"""16384 tokens: most sequences are short, and most tokens are in long ones."""


@dataclass(frozen=True)
class Packed:
    """Causal self-attention of packed sequences; the inputs are q, k, v, their starts, dy."""

    lengths: tuple[int, ...]
    n_heads: int
    head: int
    mode: Mode = "forward"

    def make(self, device: torch.device, dtype: torch.dtype, seed: int) -> Tensors:
        shape = sum(self.lengths), self.n_heads, self.head
        tensors = normal(*[shape] * (3 + (self.mode != "forward")))(device, dtype, seed)
        starts = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32)
        return *tensors[:3], starts.to(device), *tensors[3:]

    def ours(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor
    ) -> torch.Tensor:
        longest = max(self.lengths)
        y: torch.Tensor = GF.attention_varlen(
            q, k, v, starts, starts, longest, longest, is_causal=True
        )
        return y

    def theirs(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor
    ) -> torch.Tensor:
        """One sequence after another, their lengths known to the host."""
        parts = []
        for first, last in pairwise((0, *accumulate(self.lengths))):
            one = [t[first:last].transpose(0, 1)[None] for t in (q, k, v)]
            y = F.scaled_dot_product_attention(one[0], one[1], one[2], is_causal=True)
            parts.append(y[0].transpose(0, 1))
        return torch.cat(parts)

    def nested(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor
    ) -> torch.Tensor:
        """torch's attention of jagged tensors; on a CPU it has none that is causal."""
        limits: Any = dict(min_seqlen=min(self.lengths), max_seqlen=max(self.lengths))
        jagged: Any = torch.nested.nested_tensor_from_jagged
        one = [jagged(t, starts, **limits).transpose(1, 2) for t in (q, k, v)]
        y = F.scaled_dot_product_attention(one[0], one[1], one[2], is_causal=True)
        values: torch.Tensor = y.transpose(1, 2).values()
        return values

    def varlen(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor
    ) -> torch.Tensor:
        """torch's FlashAttention of packed sequences, on a GPU."""
        from torch.nn.attention.varlen import varlen_attn

        longest = max(self.lengths)
        y: Any = varlen_attn(q, k, v, starts, starts, longest, longest, window_size=(-1, 0))
        return y  # type: ignore[no-any-return]

    def case(self) -> Case:
        n_tokens, width = sum(self.lengths), self.n_heads * self.head
        n, integers = n_tokens * width, 4 * (len(self.lengths) + 1)
        products = 4 * sum(length**2 for length in self.lengths) * width // 2
        n_bytes, flops = work(self.mode, n, 2 * n, n, products, integers)
        return Case(
            op="attention",
            name=f"causal, packed{SUFFIXES[self.mode]}",
            shapes=(
                f"{len(self.lengths)} of {min(self.lengths)} to {max(self.lengths)}, "
                f"{self.n_heads} × {self.head}"
            ),
            make=self.make,
            ours=self.ours,
            theirs=self.theirs,
            rivals={"nested": self.nested, "varlen": self.varlen},
            bytes=n_bytes,
            flops=flops,
            small=replace(self, lengths=(7, 33, 1, 20), n_heads=2).case,
            mode=self.mode,
            wanted=(0, 1, 2) if self.mode != "forward" else (),
        )


@dataclass(frozen=True)
class Decode:
    """One query a sequence to a full cache; the inputs are q, k, v, lengths, and pages' numbers."""

    batch: int
    n_keys: int
    page: int | None = None
    n_heads: int = 32
    n_key_heads: int = 8
    head: int = 128

    def make(self, device: torch.device, dtype: torch.dtype, seed: int) -> Tensors:
        slots = (self.batch, self.n_key_heads, self.n_keys, self.head)
        if self.page is not None:
            slots = (self.batch * self.n_keys // self.page, slots[1], self.page, self.head)
        q = self.batch, self.n_heads, self.head
        tensors = normal(q, slots, slots)(device, dtype, seed)
        lengths = torch.full((self.batch,), self.n_keys, dtype=torch.int32, device=device)
        if self.page is None:
            return *tensors, lengths
        places = torch.randperm(slots[0], generator=torch.Generator().manual_seed(seed))
        return *tensors, lengths, places.view(self.batch, -1).to(device, torch.int32)

    def ours(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lengths: torch.Tensor,
        table: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return GF.attention_decode(q, k, v, lengths, block_table=table)

    def of(self, function: Function, *inputs: torch.Tensor) -> torch.Tensor:
        """A function of q, k and v with the caches as it takes them: pages are put in order."""
        q, k, v, _, *tables = inputs
        for table in tables:
            k, v = (pages[table.long()].transpose(1, 2).flatten(2, 3) for pages in (k, v))
        return function(q[:, :, None], k, v)[:, :, 0]

    def theirs(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Without a mask, since the cache is full: the best case of torch's attention."""
        attention = partial(F.scaled_dot_product_attention, enable_gqa=True)
        return self.of(attention, *inputs)

    def case(self) -> Case:
        n_q, n_k = (self.batch * n * self.head for n in (self.n_heads, self.n_key_heads))
        n_pages = 0 if self.page is None else self.n_keys // self.page
        integers = 4 * self.batch * (1 + n_pages)
        products = 4 * n_q * self.n_keys
        n_bytes, flops = work("forward", n_q, 2 * n_k * self.n_keys, n_q, products, integers)
        paged = "" if self.page is None else f", pages of {self.page}"
        return Case(
            op="attention",
            name=f"decode{paged}",
            shapes=(
                f"{self.batch} × {self.n_keys}, {self.n_heads} × {self.head} "
                f"over {self.n_key_heads}"
            ),
            make=self.make,
            ours=self.ours,
            theirs=self.theirs,
            rivals={
                name: partial(self.of, rival) for name, rival in rivals_of(causal=False).items()
            },
            bytes=n_bytes,
            flops=flops,
            small=replace(self, batch=2, n_keys=256, n_heads=8, n_key_heads=2).case,
        )


def attention_cases() -> list[Case]:
    """Language models and encoders in training, packed sequences, and steps of decoding."""
    both: tuple[Mode, ...] = ("forward", "backward")
    specs: list[Attention | Packed | Decode] = []
    specs += [Attention(128, 4096, True, mode) for mode in both]
    specs += [Attention(64, 4096, True, mode) for mode in both]
    specs += [Attention(128, 16384, True, mode) for mode in both]
    specs += [Attention(128, 4096, False, mode) for mode in both]
    specs += [Attention(64, 512, False, mode) for mode in both]
    specs += [Attention(64, 1024, True, "step")]
    specs += [Attention(128, 4096, True, mode, n_heads=64, n_key_heads=8) for mode in both]
    lengths = tuple(random.Random(0).sample(LENGTHS, len(LENGTHS)))
    specs += [Packed(lengths, 16, 128, mode) for mode in both]
    specs += [Decode(64, 8192), Decode(64, 8192, page=64)]
    return [spec.case() for spec in specs]
