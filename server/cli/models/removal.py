"""`inpaint-server models remove`: an entry of `models.toml`, and downloads of that model alone."""

import sys
from dataclasses import dataclass
from pathlib import Path

from models.checkpoints.catalog import Catalog, find_model
from models.checkpoints.files.manifests import manifest_path
from models.checkpoints.hub import sources_of
from server.cli.models.entries import read_text, without_entry, write_checked
from server.cli.options import Refusal
from server.core.settings import Settings
from server.core.terminal import printable, size_text


@dataclass(frozen=True, slots=True)
class Plan:
    """What is removed.

    text: of `models.toml` afterwards; None where it stays. downloads: bytes by hub id.
    shared: hub ids that other models use too.
    """

    kind: str
    name: str
    text: str | None
    downloads: dict[str, int]
    shared: frozenset[str]
    manifest: Path | None


def plan_removal(name: str, catalog: Catalog, settings: Settings) -> Plan:
    """What removing a model or LoRA means. Raises: ValueError, OSError."""
    refuse_in_use(name, settings)
    if name in catalog.loras and name not in catalog.models:
        left = without_entry(read_text(settings.models_file), "loras", name)
        return Plan("loras", name, left, {}, frozenset(), None)
    spec = find_model(name, catalog.models)
    wanted = sources_of(spec)
    others = [each for key, each in catalog.models.items() if key != name]
    others += [find_model(each, catalog.models) for each in settings.offered_models]
    shared = wanted & {source for each in others for source in sources_of(each)}
    text = None
    if name in catalog.models:
        text = without_entry(read_text(settings.models_file), "models", name)
    downloads = {source: size for source, size in cached().items() if source in wanted - shared}
    if text is None and not downloads:
        raise ValueError(f"{name!r} is neither in {settings.models_file} nor downloaded")
    manifest = manifest_path(settings.data_dir, name)
    return Plan(
        "models", name, text, downloads, frozenset(shared), manifest if manifest.exists() else None
    )


def refuse_in_use(name: str, settings: Settings) -> None:
    """Raises: ValueError for what the settings offer, and for the built-in model."""
    if name == "builtin":
        raise ValueError("the built-in model belongs to the program")
    if name in (*settings.offered_models, *settings.offered_loras):
        raise ValueError(
            f"{name!r} is offered by the settings: take it out of model, models or loras first"
        )


def cached() -> dict[str, int]:
    """Bytes on this disk by hub id."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return {}
    return {each.repo_id: each.size_on_disk for each in repos if each.repo_type == "model"}


def lines_of(plan: Plan, models_file: Path) -> list[str]:
    """What is removed and what stays, for the question."""
    entry = [] if plan.text is None else [f"the entry [{plan.kind}.{plan.name}] of {models_file}"]
    files = [f"{size_text(size)} downloaded from {each}" for each, size in plan.downloads.items()]
    stays = [f"stays, as another model uses it: {each}" for each in sorted(plan.shared)]
    return [*entry, *files, *stays, "files that were not downloaded by this program stay"]


def is_confirmed(lines: list[str], *, is_agreed: bool) -> bool:
    """Show what is removed, and ask on a terminal. Raises: Refusal where nobody can be asked."""
    for line in lines:
        print(printable(line), file=sys.stderr)  # noqa: T201 - for whoever typed the command
    if is_agreed:
        return True
    if not sys.stdin.isatty():
        raise Refusal("nothing was removed: there is no terminal to ask on, so give --yes")
    print("Remove? [y/N] ", end="", file=sys.stderr, flush=True)  # noqa: T201
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def carry_out(plan: Plan, models_file: Path) -> None:
    """Remove. Raises: ModelUnavailable, OSError."""
    if plan.text is not None:
        write_checked(models_file, plan.text)
    if plan.downloads:
        delete_downloads({*plan.downloads})
    if plan.manifest is not None:
        plan.manifest.unlink(missing_ok=True)


def delete_downloads(sources: set[str]) -> None:
    """Delete all revisions of these hub ids from the hub's cache."""
    from huggingface_hub import scan_cache_dir

    cache = scan_cache_dir()
    commits = [
        revision.commit_hash
        for repo in cache.repos
        if repo.repo_type == "model" and repo.repo_id in sources
        for revision in repo.revisions
    ]
    cache.delete_revisions(*commits).execute()
