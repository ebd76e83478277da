"""What Triton's kernels become on a GPU, without one: compiled for sm_90 and taken apart again.

The compiler of NVIDIA's machine code and its disassembler come with Triton. A kernel is compiled as
a launch would have it: for these types, these constants, these multiples of 16.
"""

import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

HOPPER = GPUTarget("cuda", 90, 32)
PROGRAMS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

BITS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}
"""Of one access, by the suffix of its instruction; 32 where there is none of these."""


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel as it was about to be started."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(frozen=True, slots=True)
class MachineCode:
    """registers: of a thread. local_bytes: of a thread, in memory: what registers did not hold.
    shared_bytes: of a block of threads; a card refuses to start more than it has.

    loads, stores: accesses to global memory that stand in the code, by their width in bits.
    products: instructions of the tensor cores, by name.
    """

    kernel: str
    registers: int
    local_bytes: int
    shared_bytes: int
    loads: Counter[int]
    stores: Counter[int]
    products: Counter[str]


def meta(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """A tensor without values."""
    return torch.empty(shape, dtype=dtype, device="meta")


def launches_of(work: Callable[[], object]) -> list[Launch]:
    """Those that a piece of code would make, none of which is made."""
    launches: list[Launch] = []
    with _intercepted(launches):
        work()
    return launches


@contextmanager
def _intercepted(launches: list[Launch]) -> Iterator[None]:
    def note(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append(Launch(kernel, arguments, options))

    start = JITFunction.run
    JITFunction.run = note
    try:
        yield
    finally:
        JITFunction.run = start


def machine_code(launch: Launch, scratch: Path) -> MachineCode:
    """For the launch on a Hopper card. scratch: a folder for the program."""
    backend = make_backend(HOPPER)
    kernel = launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound = bind(*launch.arguments, **launch.options)
    options, signature, constants, attributes = kernel._pack_args(backend, launch.options, *bound)
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=HOPPER, options=options.__dict__)
    program = scratch / "kernel.cubin"
    program.write_bytes(compiled.asm["cubin"])
    usage, assembly = taken_apart("-res-usage", program), taken_apart("-sass", program)
    return parsed(kernel.fn.__name__, usage, assembly, compiled.metadata.shared)


def taken_apart(view: str, program: Path) -> str:
    """One of the disassembler's views of a program."""
    done = subprocess.run(
        [PROGRAMS / "cuobjdump", view, program], capture_output=True, text=True, check=True
    )
    return done.stdout


def parsed(kernel: str, usage: str, assembly: str, shared_bytes: int) -> MachineCode:
    """usage, assembly: as `cuobjdump` prints them. shared_bytes: as Triton asks for them."""
    used = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    accesses: dict[str, Counter[int]] = {"LDG": Counter(), "LDGSTS": Counter(), "STG": Counter()}
    for name, suffixes in re.findall(r"\b(LDG|LDGSTS|STG)\.E((?:\.\w+)*)", assembly):
        known = [BITS[each] for each in suffixes.split(".") if each in BITS]
        accesses[name][known[0] if known else 32] += 1
    spills = len(re.findall(r"\b(?:LDL|STL)\b", assembly))
    products = Counter(re.findall(r"\b((?:HGMMA|HMMA)\.[\w.]+)", assembly))
    return MachineCode(
        kernel=kernel,
        registers=used["REG"],
        local_bytes=used["STACK"] + used["LOCAL"] + spills,
        shared_bytes=shared_bytes,
        loads=accesses["LDG"] + accesses["LDGSTS"],
        stores=accesses["STG"],
        products=products,
    )
