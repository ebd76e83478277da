"""The vendor's calls beside those for pictures: uploads, and the queue's length."""

from fastapi import Request
from starlette.responses import JSONResponse

from server.api.dependencies import ServicesOf, base_url_of
from server.api.dialects.uploads import store_upload
from server.api.dialects.vendor import reading, writing
from server.api.dialects.vendor.dependencies import CallerOf, FieldsOf, KeyId
from server.core.errors import ImageUnavailable
from server.egress.downloads import FetchFailed
from server.egress.sources import load_inline


async def upload(
    request: Request, services: ServicesOf, fields: FieldsOf, caller: CallerOf
) -> JSONResponse:
    """Store a picture for an hour; calls for pictures may name its link."""
    is_crop_wanted = reading.wants_crop(fields)
    name, source = reading.read_upload(fields)
    settings = services.settings
    try:
        content = await load_inline(source.content, settings.fetch.max_image_bytes)
    except FetchFailed as error:
        raise ImageUnavailable({name: error.kind}) from error
    stored = await store_upload(services, caller, content, base_url_of(request, settings), name)
    return JSONResponse(writing.write_upload(stored, is_crop_wanted=is_crop_wanted))


async def system_load(services: ServicesOf, key_id: KeyId) -> JSONResponse:
    """The queue's length in jobs and seconds."""
    forecast = await services.in_store_thread(services.estimator.forecast)
    return JSONResponse(writing.write_system_load(forecast.waiting, forecast.wait_s))
