"""What test_compiles.py holds a launch to: launches to compile, and what their code must have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gpunn.profiling.static_report import Report


@dataclass(frozen=True)
class Scenario:
    """Launches to compile, and what their machine code must have."""

    launch: Callable[[], object]
    tensor_cores: bool = False
    wide_only: bool = False
    """Whether every global access must be of 128 bits, but for ``narrow_allowed``."""
    capabilities: tuple[int, ...] = (80, 90, 100)
    narrow_allowed: int = 0
    """Narrower accesses that there may be: of a seed, or of the few elements at the end."""
    most_instructions: int | None = None
    """Of the whole kernel; for one without loops, what a thread executes at most."""
    without_products: tuple[str, ...] = ()
    """Kernels among them that have nothing to do for tensor cores."""

    @property
    def reads_code(self) -> bool:
        """Whether the instructions must be known."""
        return self.tensor_cores or self.wide_only or self.most_instructions is not None

    def faults(self, report: Report) -> list[str]:
        """What is wrong with the machine code; instructions that are not known are passed over."""
        wrong = {
            "spills registers": report.spilled_bytes > 0,
            "has memory of a thread's own": report.stack_bytes > 0,
            "a block does not fit": not report.fits,
            "WGMMA serialised": report.serialised_wgmma,
            "WGMMA in flight with a register operand": report.register_operand_in_pipeline,
        }
        if report.mma is not None:
            wrong |= self._faults_of_code(report)
        return [fault for fault, holds in wrong.items() if holds]

    def _faults_of_code(self, report: Report) -> dict[str, bool]:
        found, most = report.instructions or 0, self.most_instructions
        on_hopper = report.capability == 90
        cores = report.wgmma if on_hopper else report.mma
        multiplies = self.tensor_cores and report.kernel not in self.without_products
        narrow = report.narrow_accesses or 0
        return {
            "no tensor cores": multiplies and not cores,
            "MMA beside WGMMA": self.tensor_cores and on_hopper and bool(report.mma),
            "no 128-bit access": self.wide_only and not report.wide_accesses,
            f"{narrow} narrow accesses, {self.narrow_allowed} allowed": self.wide_only
            and narrow > self.narrow_allowed,
            "too many instructions": most is not None and found > most,
        }
