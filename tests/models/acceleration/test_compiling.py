"""Compiling beside the first calls: a swap when it is ready, plain calls where it fails."""

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from models.acceleration.compiling import MOST_SHAPES, CompiledUNet
from models.acceleration.graphs import GraphedUNet, GraphLimits
from models.acceleration.stack import Acceleration
from models.acceleration.unet import EagerUNet, UNetInputs
from models.checkpoints.families import Family
from models.checkpoints.registry import Components, ModelSpec, load_components
from tests.support.tiny import save_tiny_checkpoint
from tests.support.unet_calls import HostRecorder, make_shares

pytestmark = pytest.mark.slow

WAIT_S = 600


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    """As in the pipeline's verbs."""
    with torch.inference_mode():
        yield


@pytest.fixture
def small(tmp_path: Path) -> Components:
    folder = save_tiny_checkpoint(tmp_path / "tiny", 9)
    return load_components(ModelSpec("tiny", str(folder)), torch.device("cpu"), torch.float32)


class Watched:
    """A compiler that is no compiler: calls go through, once it is let go on.

    calls: (thread, rows) of each.
    """

    def __init__(self) -> None:
        self.may_go_on = threading.Event()
        self.calls: list[tuple[bool, int]] = []

    def __call__(self, unet: Any) -> Callable[..., Any]:
        def compiled(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            is_main = threading.current_thread() is threading.main_thread()
            if not is_main:
                assert self.may_go_on.wait(WAIT_S)
            self.calls.append((is_main, latents.shape[0]))
            return unet(latents, *args, **kwargs)

        return compiled


def test_whole_unet_can_be_compiled_and_agrees(tmp_path: Path) -> None:
    """By torch.compile, with a back end that runs what was traced without any C++."""
    folder = save_tiny_checkpoint(tmp_path / "tiny", 9, Family.SDXL)
    components = load_components(ModelSpec("tiny", str(folder)), torch.device("cpu"), torch.float32)
    made: list[int] = []

    def backend(graph: Any, example: Any) -> Callable[..., Any]:
        made.append(threading.get_ident())
        forward: Callable[..., Any] = graph.forward
        return forward

    def compiler(unet: Any) -> Callable[..., Any]:
        compiled: Callable[..., Any] = torch.compile(
            unet, fullgraph=True, dynamic=False, backend=backend
        )
        return compiled

    plain = EagerUNet(components.unet)
    call = CompiledUNet(components.unet, plain, compiler)
    inputs = UNetInputs.gather(make_shares(components, [2]))
    call(inputs)
    call.settle(WAIT_S)

    result = call(UNetInputs.gather(make_shares(components, [2], seed=3)))

    expected = plain(UNetInputs.gather(make_shares(components, [2], seed=3)))
    torch.testing.assert_close(result, expected)
    assert call.version == 1
    assert len(made) == 1
    assert made[0] != threading.get_ident()  # and the main thread did not compile again


def test_calls_are_plain_until_the_swap(small: Components) -> None:
    compiler = Watched()
    call = CompiledUNet(small.unet, EagerUNet(small.unet), compiler)
    inputs = UNetInputs.gather(make_shares(small, [2]))

    before = call(inputs)
    assert call.is_changing
    assert (call.version, compiler.calls) == (0, [])
    compiler.may_go_on.set()
    call.settle(WAIT_S)
    after = call(inputs)

    assert not call.is_changing
    assert compiler.calls == [(False, 2), (True, 2)]
    assert torch.equal(before, after)


def test_graphs_are_recorded_over_compiled_code(small: Components) -> None:
    compiler, recorder = Watched(), HostRecorder()
    call = CompiledUNet(small.unet, EagerUNet(small.unet), compiler)
    unet = GraphedUNet(call, [], recorder, GraphLimits(1000))
    shares = make_shares(small, [2])
    for _ in range(3):
        unet(shares)
    assert recorder.attempts == 0, "the compiler uses the device too, from the first call on"
    compiler.may_go_on.set()
    call.settle(WAIT_S)
    for _ in range(3):
        unet(shares)

    assert recorder.rows == [2]
    assert (True, 2) in compiler.calls


def test_failure_is_told_once_and_plain_calls_go_on(
    small: Components, caplog: pytest.LogCaptureFixture
) -> None:
    def compiler(unet: Any) -> Callable[..., Any]:
        def compiled(*args: Any, **kwargs: Any) -> Any:
            raise OSError("no compiler found")

        return compiled

    plain = EagerUNet(small.unet)
    call = CompiledUNet(small.unet, plain, compiler)
    with caplog.at_level(logging.WARNING):
        for rows in (1, 2, 3):
            inputs = UNetInputs.gather(make_shares(small, [rows]))
            for _ in range(2):
                assert torch.equal(call(inputs), plain(inputs))
            call.settle(WAIT_S)

    assert len(caplog.records) == 1
    assert call.version == 0


def test_number_of_shapes_is_bounded(small: Components) -> None:
    compiler = Watched()
    compiler.may_go_on.set()
    call = CompiledUNet(small.unet, EagerUNet(small.unet), compiler)
    for rows in range(1, MOST_SHAPES + 3):
        call(UNetInputs.gather(make_shares(small, [rows])))
    call.settle(WAIT_S)

    assert len([call for call in compiler.calls if not call[0]]) == MOST_SHAPES


def test_reproducible_pictures_are_not_compiled() -> None:
    with pytest.raises(ValueError, match="compiled"):
        Acceleration(is_compiled=True, is_reproducible=True)
