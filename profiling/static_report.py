"""What a kernel costs, read from its machine code: no GPU needed.

A function or a launcher is called on meta tensors while its launches are captured
(``launch.captured``); each captured launch is compiled for a chip, and registers, spills, shared
memory and instructions are read (``machine_code.py``). This cannot say how fast a kernel is; it
says that it builds, fits, does not spill, and uses the instructions it should.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from gpunn.kernels.launch import Call, Device
from gpunn.profiling.machine_code import compiled, disassembled

MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
# Bytes of shared memory that one block may have; the compiler does not check it. And the
# registers, threads and shared memory of one multiprocessor. Source: CUDA C++ programming guide,
# "Technical specifications per compute capability".
SHARED_MEMORY_A_BLOCK = {80: 166912, 90: 232448, 100: 232448}
SHARED_MEMORY_RESERVED = 1024
REGISTERS, THREADS, BLOCKS = 65536, 2048, 32


def chip(capability: int) -> Device:
    """The A100, H200 or B200 for capability 80, 90 or 100."""
    return Device(capability, MULTIPROCESSORS[capability])


@dataclass(frozen=True)
class Report:
    """The static facts of one compiled kernel."""

    kernel: str
    launch: str
    capability: int
    registers: int
    spilled_bytes: int
    shared_memory: int
    occupancy: float
    """The share of a multiprocessor's threads that can be resident, as registers and memory go."""
    stack_bytes: int
    """Memory of a thread's own, which is as slow as spills: arrays not held in registers."""
    wgmma: int | None
    """HGMMA instructions: the warp-group tensor cores of Hopper. None: the code was not read."""
    mma: int | None
    """Other tensor-core instructions: HMMA, DMMA, or UTCHMMA on Blackwell."""
    wide_accesses: int | None
    """Global loads and stores of 128 bits, and asynchronous copies of 128 bits or by TMA."""
    narrow_accesses: int | None
    """Other global loads and stores."""
    instructions: int | None
    """All of them, loops and untaken branches counted once."""
    serialised_wgmma: bool
    """Whether the assembler had to wait after every HGMMA (its warning C75xx)."""
    register_operand_in_pipeline: bool
    """Whether a WGMMA with its left operand in registers is left in flight: a compiler hazard."""

    @property
    def fits(self) -> bool:
        """Whether the chip has the registers and the shared memory for a block."""
        return self.occupancy > 0


# The instructions that are counted, as a disassembler writes them. LD and ST are loads and stores
# whose address may be in global memory for all that the compiler knows.
COUNTED = {
    "wgmma": r"\bHGMMA",
    "mma": r"\b(?:HMMA|DMMA|UTCHMMA|UTCQMMA)",
    "wide_accesses": r"\b(?:LDG|STG|LDGSTS|LD|ST)\.[\w.]*(?:128|256)|\bUTMA(?:LDG|STG)",
    "narrow_accesses": r"\b(?:LDG|STG|LDGSTS|LD|ST)\.(?![\w.]*(?:128|256))",
    "instructions": r"(?m)^\s*/\*[0-9a-f]{4,}\*/\s+(?!NOP|\s)",
}


# The same in PTX, for which no disassembler is needed. The assembler neither joins accesses nor
# splits them; how many instructions it makes of the rest is not to be seen here.
COUNTED_IN_PTX = {
    "wgmma": r"\bwgmma\.mma_async",
    "mma": r"\b(?:mma\.sync|tcgen05\.mma)",
    "wide_accesses": r"(?<![.\w])(?:ld|st)(?=\.)(?!\.(?:param|shared|local|const))[\w.:]*"
    r"\.(?:v4\.\w32|v[24]\.\w64|v8\.\w(?:16|32)|b128)\b"
    r"|\bcp\.async\.c[ag]\.[^;]*?\],\s*(?:0x10|16)\b"
    r"|\bcp\.async\.bulk\.tensor[\w.:]*\.global",
    "accesses": r"(?<![.\w])(?:ld|st)\.(?!param|shared|local|const)|\bcp\.async\.c[ag]\."
    r"|\bcp\.async\.bulk\.tensor[\w.:]*\.global",
}


def _counts(assembly: str | None) -> dict[str, int | None]:
    return {
        name: None if assembly is None else len(re.findall(pattern, assembly))
        for name, pattern in COUNTED.items()
    }


def counts_in_ptx(ptx: str) -> dict[str, int | None]:
    """What COUNTED counts, in PTX; None of instructions."""
    counts: dict[str, int | None] = {"instructions": None}
    # searching the statements that may count takes a fifth of the time of searching all
    told = ("ld.", "st.", "cp.async.", "mma.")
    ptx = ";".join(part for part in ptx.split(";") if any(word in part for word in told))
    found = {name: len(re.findall(pattern, ptx)) for name, pattern in COUNTED_IN_PTX.items()}
    counts["narrow_accesses"] = found.pop("accesses") - found["wide_accesses"]
    return counts | found


def _occupancy(registers: int, shared_memory: int, n_threads: int, capability: int) -> float:
    per_thread = -(-max(registers, 1) // 8) * 8
    by_registers = REGISTERS // (per_thread * n_threads)
    whole = SHARED_MEMORY_A_BLOCK[capability] + SHARED_MEMORY_RESERVED
    by_memory = whole // (shared_memory + SHARED_MEMORY_RESERVED)
    return min(by_registers, by_memory, THREADS // n_threads, BLOCKS) * n_threads / THREADS


def report(call: Call, capability: int, from_ptx: bool = False) -> Report:
    """Compile a captured launch and read its machine code.

    ``from_ptx``: count in the code as it was before it was assembled, which takes less time.
    """
    code = compiled(call, capability)
    log = code.log
    counts = counts_in_ptx(code.ptx) if from_ptx else _counts(disassembled(code.cubin))
    return Report(
        kernel=code.kernel,
        launch=str(call.launch),
        capability=capability,
        registers=code.registers,
        spilled_bytes=sum(map(int, re.findall(r"(\d+) bytes spill", log))),
        shared_memory=code.shared_memory,
        occupancy=_occupancy(code.registers, code.shared_memory, code.n_threads, capability),
        stack_bytes=sum(map(int, re.findall(r"(\d+) bytes stack frame", log))),
        serialised_wgmma=bool(re.search(r"C75\d\d", log)) or "serializ" in log,
        register_operand_in_pipeline=_register_operand_in_pipeline(code.ptx),
        **counts,
    )


def _register_operand_in_pipeline(ptx: str) -> bool:
    """A wgmma whose left operand is a list of registers, with a wait that leaves one in flight."""
    in_registers = re.search(r"wgmma\.mma_async[^;]*?\}\s*,\s*\{", ptx)
    in_flight = re.search(r"wgmma\.wait_group\.sync\.aligned\s+[1-9]", ptx)
    return bool(in_registers and in_flight)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor with a shape and no memory, for launchers whose launches are captured."""
    return torch.empty(shape, dtype=dtype, device="meta")
