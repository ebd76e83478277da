"""What the vendor's endpoints ask for: fields, and the caller behind their key."""

from typing import Annotated

from fastapi import Depends, Request

from server.api.auth.keyring import Caller
from server.api.bodies import Fields, read_fields
from server.api.dependencies import ServicesOf, admit
from server.api.dialects.vendor.reading import read_key


async def get_fields(request: Request, services: ServicesOf) -> Fields:
    """The parameters of body and query. Raises: InvalidBody."""
    return await read_fields(request, services.settings.max_body_bytes)


FieldsOf = Annotated[Fields, Depends(get_fields)]


async def get_caller(request: Request, fields: FieldsOf) -> Caller:
    """The caller with its limits. Raises: InvalidApiKey, RateLimited."""
    return admit(request, read_key(fields, request.headers))


CallerOf = Annotated[Caller, Depends(get_caller)]


async def get_key_id(caller: CallerOf) -> str:
    """The key id of the caller, which owns the jobs."""
    return caller.key_id


KeyId = Annotated[str, Depends(get_key_id)]
