"""`/sdapi/v1` by webuiapi, and by sd-backend-client, which checks more."""

import numpy as np
import pytest

from tests.support.clouds import Clouds
from tests.support.programs import CallClient, MakeCall

WEBUIAPI, SD_BACKEND = "a1111_webuiapi.py", "a1111_sd_backend.py"


@pytest.mark.parametrize("name", [WEBUIAPI, SD_BACKEND])
def test_img2img_paints_where_the_mask_is_white_or_opaque(
    name: str, client: CallClient, call: MakeCall, clouds: Clouds
) -> None:
    answers = client(
        name,
        call(),
        call(),
        call(mask=clouds.mask_opaque),
        call(mask=clouds.mask_jpeg),
        call(seed=8),
    )

    for answer in answers:
        clouds.assert_edited(answer.picture)
    first, *others, other_seed = [answer.picture for answer in answers]
    assert all(np.array_equal(each, first) for each in others)
    assert not np.array_equal(other_seed, first)


def test_batch_and_only_masked(client: CallClient, call: MakeCall, clouds: Clouds) -> None:
    batch, only_masked = client(WEBUIAPI, call(n=2), call(only_masked=True))

    one, other = batch.pictures
    clouds.assert_edited(one)
    clouds.assert_edited(other)
    assert not np.array_equal(one, other)
    clouds.assert_edited(only_masked.picture)


def test_errors_arrive_at_webuiapi(client: CallClient, call: MakeCall) -> None:
    wrong_key, no_image = client(WEBUIAPI, call(key="wrong"), call(image=""))

    assert wrong_key.error == "RuntimeError"
    assert wrong_key.text.startswith("(401,")
    assert "key" in wrong_key.text
    assert no_image.error == "RuntimeError"
    assert "image" in no_image.text


def test_wrong_key_arrives_at_sd_backend_client(client: CallClient, call: MakeCall) -> None:
    (wrong_key,) = client(SD_BACKEND, call(key="wrong"))

    assert wrong_key.error == "AuthError"
