"""One of two processes with the variables that torchrun gives them: the demos that they share.

All in one test, for half a test's time is taken by the imports of two processes.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

import small_gan
import small_translation
from processes import processes


def main(out: Path) -> None:
    """Train together, and say so if all is as it should be."""
    with processes(torch.device("cpu")) as (group, _):
        if group.size != 2:
            raise RuntimeError(f"expected two processes, got {group.size}")
        small_translation.train_together(out / "translation", group)
        small_gan.train_together(out / "gan", group)
        print("all agree", flush=True)
    os._exit(0)  # gloo's threads can wait for ever on the interpreter that is shutting down


if __name__ == "__main__":
    main(Path(sys.argv[1]))
