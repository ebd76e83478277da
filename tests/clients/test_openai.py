"""`POST /v1/images/edits` by the `openai` packages for Python and Node, and by litellm."""

import numpy as np
import pytest

from tests.support.clouds import Clouds
from tests.support.programs import CallClient, MakeCall

OPENAI_PYTHON, OPENAI_NODE, LITELLM = "openai_edit.py", "openai_edit.mjs", "litellm_edit.py"
WAYS: dict[str, list[dict[str, str]]] = {
    OPENAI_PYTHON: [{}, {"way": "list"}, {"way": "nameless"}, {"way": "url"}],
    OPENAI_NODE: [{}, {"way": "stream"}],
    LITELLM: [{}],
}
"""In which each of them can send the files and read the picture."""


@pytest.mark.parametrize("name", WAYS)
def test_edit_paints_where_the_mask_is_transparent(
    name: str, client: CallClient, call: MakeCall, clouds: Clouds
) -> None:
    calls = [call(mask=clouds.mask_alpha, **way) for way in WAYS[name]]

    answers = client(name, *calls, call(mask=clouds.mask_alpha, seed=8))

    for answer in answers:
        clouds.assert_edited(answer.picture)
    first, *others, other_seed = [answer.picture for answer in answers]
    assert all(np.array_equal(each, first) for each in others)
    assert not np.array_equal(other_seed, first)


def test_n_pictures_differ(client: CallClient, call: MakeCall, clouds: Clouds) -> None:
    (answer,) = client(OPENAI_PYTHON, call(mask=clouds.mask_alpha, n=2))

    one, other = answer.pictures
    clouds.assert_edited(one)
    clouds.assert_edited(other)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("name", WAYS)
def test_errors_arrive_as_the_clients_own(
    name: str, client: CallClient, call: MakeCall, clouds: Clouds
) -> None:
    wrong_key, no_prompt, broken, opaque = client(
        name,
        call(mask=clouds.mask_alpha, key="wrong"),
        call(mask=clouds.mask_alpha, prompt=""),
        call(mask=clouds.mask_alpha, image=clouds.broken),
        call(),
    )

    assert wrong_key.error == "AuthenticationError"
    assert "key" in wrong_key.text
    assert no_prompt.error == "BadRequestError"
    assert "prompt" in no_prompt.text
    assert broken.error == "BadRequestError"
    assert "image" in broken.text
    # A mask that is white on black, as other languages want it, has nothing transparent.
    assert opaque.error == "BadRequestError"
    assert "transparent" in opaque.text
