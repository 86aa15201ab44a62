"""What this machine is and what it can do: the measured peak that speeds are held against."""

from __future__ import annotations

import functools
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from manyform.errors import ManyformError

# bf16 must be at least this much faster in plain matrix products to pay for the casts around it.
_GAIN = 1.5
_SECONDS = 0.1


@dataclass(frozen=True)
class MachineFacts:
    """One device of this machine.

    bf16_gflops, fp32_gflops: the best measured rate of a square matrix product, in 1e9 operations
    a second (a multiply-add is two).
    """

    device: str
    name: str
    cores: int
    threads: int
    memory_bytes: int
    system: str
    python: str
    torch: str
    amx: bool
    bf16_gflops: float
    fp32_gflops: float

    @property
    def bf16_gains(self) -> bool:
        """Whether training in bf16 pays here."""
        return self.bf16_gflops > _GAIN * self.fp32_gflops

    def peak_flops(self, precision: str) -> float:
        """Measured peak in operations a second for "bf16" or "fp32"."""
        return 1e9 * (self.bf16_gflops if precision == "bf16" else self.fp32_gflops)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


@functools.cache
def machine_facts(device: str = "cpu") -> MachineFacts:
    """Facts of `device` ("cpu", "cuda", "cuda:1", "mps"), the peaks measured in about a second.

    Measured once a process. Raises ManyformError where the device is not there.
    """
    where = find_device(device)
    rates = {dtype: _peak_rate(where, dtype) for dtype in (torch.bfloat16, torch.float32)}
    return MachineFacts(
        device=str(where), name=_name(where), cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(), memory_bytes=_memory(where),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(), torch=torch.__version__, amx=_amx(),
        bf16_gflops=round(rates[torch.bfloat16] / 1e9, 1),
        fp32_gflops=round(rates[torch.float32] / 1e9, 1))


def find_device(name: str = "auto") -> torch.device:
    """The device of that name; "auto" is the GPU if CUDA sees one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ManyformError(f"device {name!r} cannot be used here: {reason}") from error
    return device


@functools.cache
def bf16_gains(device: str) -> bool:
    """Whether bf16 training pays on `device`: by generation on CUDA (8.0 and later compute in it),
    by one short measured comparison of matrix products elsewhere."""
    where = torch.device(device)
    if where.type == "cuda":
        return torch.cuda.get_device_capability(where) >= (8, 0)
    bf16, fp32 = (_matmul_rate(where, dtype, 512, seconds=0.03)
                  for dtype in (torch.bfloat16, torch.float32))
    return bf16 > _GAIN * fp32


def resolve_precision(precision: str, device: torch.device) -> str:
    """"bf16" or "fp32" for a setting that may be "auto"."""
    if precision != "auto":
        return precision
    return "bf16" if bf16_gains(str(device)) else "fp32"


def _peak_rate(device: torch.device, dtype: torch.dtype) -> float:
    """The best rate over growing sizes, as far as one product stays within the time allowed."""
    best, n = 0.0, 512
    while n <= (2048 if device.type == "cpu" else 8192):
        best = max(best, _matmul_rate(device, dtype, n))
        n *= 2
        if 2 * n**3 / best > _SECONDS:
            break
    return best


def _matmul_rate(device: torch.device, dtype: torch.dtype, n: int,
                 seconds: float = _SECONDS) -> float:
    """The best rate of an n by n matrix product within `seconds`, in operations a second."""
    # A generator of its own: a measurement must not move the one that training draws from.
    a = torch.rand(n, n, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    best, deadline = float("inf"), None
    while deadline is None or time.perf_counter() < deadline:
        _wait(device)
        started = time.perf_counter()
        a @ a
        _wait(device)
        best = min(best, time.perf_counter() - started)
        if deadline is None:  # the first product warms up
            deadline = time.perf_counter() + seconds
    return 2 * n**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memory(device: torch.device) -> int:
    """Bytes of memory, 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if sys.platform == "win32":
        import ctypes
        kilobytes = ctypes.c_ulonglong()
        ctypes.windll.kernel32.GetPhysicallyInstalledSystemMemory(ctypes.byref(kilobytes))
        return kilobytes.value * 1024
    return 0


def _amx() -> bool:
    """Whether the CPU has matrix tiles (Intel AMX); False where torch does not say."""
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(probe and probe())
