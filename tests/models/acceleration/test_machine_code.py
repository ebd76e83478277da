"""The kernels as a Hopper card would run them, at the sizes of SD 1.5 at 512².

Nothing is run. This shows that no number leaves the registers for memory and that memory is
accessed in wide words, and not how long that takes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.support.programs import needs_triton

pytestmark = [
    pytest.mark.process,
    needs_triton,
]


class Bounds(NamedTuple):
    """Of a thread's registers, and of the narrowest access to global memory, in bits.

    products: what tensor cores are given at a time, rows by columns by depth.
    """

    most_registers: int
    load_bits: int
    store_bits: int
    products: frozenset[str] = frozenset()


SHARED_BYTES = 232_448
"""What a program on an H100 can have; Triton raises OutOfResources where a kernel needs more."""

HEADS_OF_40 = frozenset(f"HGMMA.64x{columns}x16.F32" for columns in (16, 32, 128))
HEADS_OF_80 = frozenset(f"HGMMA.64x{columns}x16.F32" for columns in (16, 64, 128))

TILES = {
    "_tile_moments": Bounds(64, 128, 32),  # stores two numbers a channel
    "_combine_moments": Bounds(64, 32, 32),  # a thousandth of the traffic
    "_norm_tile": Bounds(80, 32, 128),  # loads two statistics a channel besides
}
KERNELS = {
    # A group's channels are 40, 20 or 10, which are whole words of 16, 8 and 4 bytes.
    "norm of 16², 1280 channels": {"_norm_small_group": Bounds(128, 128, 128)},
    "norm of 16², 640 channels": {"_norm_small_group": Bounds(80, 64, 64)},
    "norm of 32², 320 channels": {"_norm_small_group": Bounds(168, 32, 32)},
    "norm of 64², 320 channels": TILES,
    "layer norm of 320": {"_norm_lines": Bounds(64, 64, 128)},
    "layer norm of 320, shifted": {"_norm_lines": Bounds(64, 64, 128)},
    "layer norm of 1280": {"_norm_lines": Bounds(64, 64, 128)},
    "sum of 320 channels": {"_add_bias": Bounds(80, 64, 128)},
    "gate of 1280": {"_gated_gelu": Bounds(80, 128, 128)},
    "heads of 40": {"_narrow_attention": Bounds(168, 128, 128, HEADS_OF_40)},
    "heads of 40, 77 keys": {"_narrow_attention": Bounds(168, 128, 128, HEADS_OF_40)},
    "heads of 80": {"_narrow_attention": Bounds(216, 128, 128, HEADS_OF_80)},
    "heads of 80, 77 keys": {"_narrow_attention": Bounds(216, 128, 128, HEADS_OF_80)},
}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With Triton's cache, in which sizes of one kernel find it compiled."""
    return tmp_path_factory.mktemp("machine-code")


def call_of(name: str) -> Callable[[], object]:
    """What starts the kernels of a row of the table."""
    from models.acceleration.kernels import add_bias, gated_gelu, group_norm, layer_norm
    from models.acceleration.narrow_attention import narrow_attention
    from tests.support.machine_code import meta

    def norm(rows: int, pixels: int, channels: int) -> object:
        shift, line = meta(rows, channels), meta(channels)
        hidden = meta(rows, pixels, channels)
        return group_norm(hidden, 32, line, line, 1e-5, shift=shift, is_activated=True)

    def lines(pixels: int, channels: int, shift: torch.Tensor | None = None) -> object:
        line = meta(channels)
        return layer_norm(meta(2, pixels, channels), line, line, 1e-5, shift=shift)

    def heads(tokens: int, channels: int) -> object:
        query, key, value = meta(2, tokens, 3 * channels).chunk(3, dim=-1)
        return narrow_attention(query, key, value, 8)

    def text_heads(tokens: int, channels: int) -> object:
        key, value = meta(2, 77, 2 * channels).chunk(2, dim=-1)
        return narrow_attention(meta(2, tokens, channels), key, value, 8)

    return {
        "norm of 16², 1280 channels": lambda: norm(2, 16 * 16, 1280),
        "norm of 16², 640 channels": lambda: norm(2, 16 * 16, 640),
        "norm of 32², 320 channels": lambda: norm(2, 32 * 32, 320),
        "norm of 64², 320 channels": lambda: norm(2, 64 * 64, 320),
        "layer norm of 320": lambda: lines(4096, 320),
        "layer norm of 320, shifted": lambda: lines(4096, 320, meta(320, dtype=torch.float32)),
        "layer norm of 1280": lambda: lines(256, 1280),
        "sum of 320 channels": lambda: add_bias(meta(2, 4096, 320), meta(2, 4096, 320), meta(320)),
        "gate of 1280": lambda: gated_gelu(meta(2, 4096, 2 * 1280)),
        "heads of 40": lambda: heads(4096, 320),
        "heads of 40, 77 keys": lambda: text_heads(4096, 320),
        "heads of 80": lambda: heads(1024, 640),
        "heads of 80, 77 keys": lambda: text_heads(1024, 640),
    }[name]


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_stay_in_registers_and_access_wide_words(
    name: str, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.support.machine_code import launches_of, machine_code

    monkeypatch.setenv("TRITON_CACHE_DIR", str(scratch / "cache"))
    codes = [machine_code(launch, scratch) for launch in launches_of(call_of(name))]

    assert [code.kernel for code in codes] == [*KERNELS[name]]
    for code, bounds in zip(codes, KERNELS[name].values(), strict=True):
        assert code.local_bytes == 0, code
        assert code.shared_bytes <= SHARED_BYTES, code
        assert code.registers <= bounds.most_registers, code
        assert min(code.loads) >= bounds.load_bits, code
        assert min(code.stores) >= bounds.store_bits, code
        assert frozenset(code.products) == bounds.products, code


def test_heads_of_40_are_48_numbers_to_the_tensor_cores(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps of depth 16 make the scores, and 32 + 16 columns the result: not 64."""
    from tests.support.machine_code import launches_of, machine_code

    monkeypatch.setenv("TRITON_CACHE_DIR", str(scratch / "cache"))
    (launch,) = launches_of(call_of("heads of 40"))
    products = machine_code(launch, scratch).products

    assert products["HGMMA.64x128x16.F32"] == 3
    assert products["HGMMA.64x32x16.F32"] == products["HGMMA.64x16x16.F32"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_card_can_start_the_widest_heads_that_are_taken(
    dtype: torch.dtype, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from models.acceleration.narrow_attention import can_attend, narrow_attention
    from tests.support.machine_code import launches_of, machine_code, meta

    monkeypatch.setenv("TRITON_CACHE_DIR", str(scratch / "cache"))
    width = max(width for width in range(512) if can_attend(width, dtype.itemsize))
    one = meta(1, 256, width, dtype=dtype)
    (launch,) = launches_of(lambda: narrow_attention(one, one, one, 1))

    assert machine_code(launch, scratch).shared_bytes <= SHARED_BYTES


def test_heads_of_160_are_left_to_torch() -> None:
    from models.acceleration.narrow_attention import can_attend

    half, single = ([width for width in (40, 80, 160) if can_attend(width, n)] for n in (2, 4))

    assert half == [40, 80]
    assert single == [40]


def test_narrow_accesses_and_spills_would_be_seen() -> None:
    """On lines as the disassembler prints them."""
    from tests.support.machine_code import parsed

    usage = "Function k:\n  REG:255 STACK:64 SHARED:0 LOCAL:0 CONSTANT[0]:600 TEXTURE:0\n"
    assembly = """
        /*0010*/ LDG.E.U16 R2, desc[UR4][R2.64] ;
        /*0020*/ LDG.E.128.CONSTANT R4, desc[UR4][R8.64] ;
        /*0030*/ @!P0 LDG.E R3, desc[UR4][R8.64] ;
        /*0040*/ STL [R1], R4 ;
        /*0050*/ HGMMA.64x64x16.F32 R24, gdesc[UR8] ;
        /*0060*/ STG.E.64 desc[UR4][R2.64], R4 ;
    """
    code = parsed("k", usage, assembly, 0)

    assert code.registers == 255
    assert code.local_bytes > 64
    assert code.loads == {16: 1, 128: 1, 32: 1}
    assert code.stores == {64: 1}
    assert code.products == {"HGMMA.64x64x16.F32": 1}
