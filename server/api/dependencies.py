"""What endpoints of all dialects need: services, caller, the server's address, a job."""

from contextlib import suppress
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Request

from server.api.auth.keyring import ANONYMOUS, Caller, is_in_basic, key_in_headers
from server.api.dialects.base import ReadingPolicy
from server.api.proxies import BASE_URL
from server.api.services import Services
from server.core.errors import CrossSite, JobNotFound, StorageUnavailable
from server.core.settings import Settings
from server.jobs.job import Job, JobState


def get_services(request: Request) -> Services:
    """The services of the application that answers this request."""
    services: Services = request.app.state.services
    return services


async def provide_services(request: Request) -> Services:
    """`get_services` as a dependency. It is async because FastAPI runs others in a thread."""
    return get_services(request)


ServicesOf = Annotated[Services, Depends(provide_services)]


def admit(request: Request, key: str | None) -> Caller:
    """The caller behind the key that a dialect has read.

    Raises: InvalidApiKey, RateLimited; CrossSite for a page of another site whose user has typed
        the key into the browser (CSRF).
    """
    address = request.client.host if request.client else ""
    services = get_services(request)
    caller = services.keys.admit(key, address)
    is_stored = caller.key_id != ANONYMOUS and is_in_basic(key, request.headers)
    if is_stored and is_of_other_site(request, services.settings):
        raise CrossSite
    return caller


def is_of_other_site(request: Request, settings: Settings) -> bool:
    """Whether a page of another site calls, that `cors_origins` does not name; `*` names none.

    A GET navigation is allowed: the page with the link cannot read the answer.
    """
    headers = request.headers
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if origin is None:
        is_link = request.method == "GET" and headers.get("sec-fetch-mode") == "navigate"
        return site in ("cross-site", "same-site") and not is_link
    own_urls = (called_url_of(request), settings.public_url or "")
    is_own = site == "same-origin" or authority_of(origin) in filter(
        None, map(authority_of, own_urls)
    )
    return not is_own and origin not in settings.cors_origins


def authority_of(url: str) -> str:
    """Host and port of a URL in lower case; `""` for an invalid one, and for the Origin `null`."""
    try:
        return urlsplit(url).netloc.lower()
    except ValueError:
        return ""


async def get_caller(request: Request) -> Caller:
    """The caller by the key in its headers. Raises: InvalidApiKey, RateLimited, CrossSite."""
    return admit(request, key_in_headers(request.headers))


CallerOf = Annotated[Caller, Depends(get_caller)]


def base_url_of(request: Request, settings: Settings) -> str:
    """The configured public address, or the one the client used; no slash at the end."""
    if settings.public_url:
        return settings.public_url.rstrip("/")
    return called_url_of(request)


def called_url_of(request: Request) -> str:
    """Scheme and host the client used, and the prefix of a proxy; no slash at the end."""
    scope, host = request.scope, request.headers.get("host")
    if BASE_URL in scope:
        return str(scope[BASE_URL])
    # Starlette's `base_url` gives the same ten times as slowly; it serves requests without a Host.
    base_url = f"{scope['scheme']}://{host}{scope.get('root_path', '')}" if host else ""
    return (base_url or str(request.base_url)).rstrip("/")


async def find_job(services: Services, job_id: int, key_id: str) -> Job:
    """A job of this key.

    Raises: JobNotFound, also for a job of another key; StorageUnavailable.
    """
    job = await services.in_store_thread(services.store.get, job_id)
    if job is None or job.key_id != key_id:
        raise JobNotFound
    if job.state is JobState.FINISHED and job.finished_at is not None:
        services.metrics.observe_estimate(services.quotes.pop_ratio(job.id, job.finished_at))
    return job


async def eta_s(services: Services, job: Job) -> float:
    """Estimated seconds until a job ends."""
    forecast = await services.in_store_thread(services.estimator.forecast, job.id)
    return services.quotes.quote(job.id, forecast.eta_s(job.id))


async def cancel(services: Services, job: Job) -> Job:
    """Cancel a job that has not ended; the job, which may have ended in another way before.

    A running job leaves the device between two steps, within a second.
    Raises: JobNotFound, StorageUnavailable.
    """
    is_changed = await services.in_store_thread(services.store.cancel, job.id)
    if is_changed:
        with suppress(StorageUnavailable):  # `Janitor` removes the input later
            await services.in_file_thread(services.storage.delete, job.input_key)
    ended = await services.in_store_thread(services.store.get, job.id)
    if ended is None:
        raise JobNotFound
    return ended


def reading_policy(settings: Settings, caller: Caller) -> ReadingPolicy:
    """The operator's choices for reading this caller's requests."""
    return ReadingPolicy(
        models=settings.offered_models,
        aliases=settings.model_aliases,
        loras=settings.offered_loras,
        force_safety_check=settings.safety.force or caller.limits.force_safety_checker,
        https_webhooks=settings.webhook.https_only,
        steps_policy=settings.steps_policy,
        enhancement=settings.enhance,
    )
