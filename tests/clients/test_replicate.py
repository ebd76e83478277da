"""`/v1/predictions` by the `replicate` packages for Python and Node."""

import numpy as np
import pytest

from tests.support.clouds import Clouds
from tests.support.programs import CallClient, MakeCall

PYTHON, NODE = "replicate_run.py", "replicate_run.mjs"
MODEL = "stability-ai/stable-diffusion-inpainting"
VERSION = f"{MODEL}:95b7223104132402a9ae91cc677285bc5eb997834bd2349fa486f53910fd68b3"
"""As public programs name it."""


@pytest.mark.parametrize("name", [PYTHON, NODE])
def test_run_paints_where_the_mask_is_white(
    name: str, client: CallClient, call: MakeCall, clouds: Clouds
) -> None:
    answers = client(
        name,
        call(model=VERSION),
        call(model=MODEL),
        call(model=VERSION, way="base64"),
        call(model=VERSION, mask=clouds.mask_jpeg),
        call(model=VERSION, seed=8),
    )

    for answer in answers:
        clouds.assert_edited(answer.picture)
    first, *others, other_seed = [answer.picture for answer in answers]
    assert all(np.array_equal(each, first) for each in others)
    assert not np.array_equal(other_seed, first)


@pytest.mark.parametrize("name", [PYTHON, NODE])
def test_run_waits_on_where_the_call_is_too_short(
    name: str, client: CallClient, call: MakeCall, clouds: Clouds
) -> None:
    """Both packages poll only if the first answer says "starting"."""
    (answer,) = client(name, call(model=VERSION, steps=100, wait=1))

    clouds.assert_edited(answer.picture)


@pytest.mark.parametrize("name", [PYTHON, NODE])
def test_each_output_is_a_picture(
    name: str, client: CallClient, call: MakeCall, clouds: Clouds
) -> None:
    (answer,) = client(name, call(model=VERSION, n=2))

    one, other = answer.pictures
    clouds.assert_edited(one)
    clouds.assert_edited(other)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize(("name", "error"), [(PYTHON, "ReplicateError"), (NODE, "ApiError")])
def test_errors_arrive_as_the_clients_own(
    name: str, error: str, client: CallClient, call: MakeCall, clouds: Clouds
) -> None:
    answers = client(
        name,
        call(model=VERSION, key="wrong"),
        call(model=VERSION, prompt=""),
        call(model=VERSION, image=clouds.broken),
        call(unknown="no-such-prediction"),
    )

    assert [answer.error for answer in answers] == [error] * 4
    wrong_key, no_prompt, broken, unknown = [answer.text for answer in answers]
    assert "401" in wrong_key
    assert "key" in wrong_key
    assert "prompt" in no_prompt
    assert "image" in broken
    assert "404" in unknown
