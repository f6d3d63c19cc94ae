"""Opening Feast on a home: definitions from `feature_repo/`, applied when they have changed.

Feast takes seconds to import, and most commands of the pipeline never need it: it is imported
inside the functions that do. Feast 0.67 sends no usage statistics.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, cast

from behavior_pipeline.errors import PipelineError
from behavior_pipeline.feature_store.configuration import (
    configuration_file,
    has_online_file,
    online_place,
    read_configuration,
    speaking_to_server,
)
from behavior_pipeline.feature_store.exclusive import exclusive
from behavior_pipeline.feature_store.online_sqlite import make_file
from behavior_pipeline.feature_store.upgrade import upgrade
from behavior_pipeline.feature_store.versions import (
    VERSIONED,
    Versions,
    known_version,
    read_versions,
)
from behavior_pipeline.storage import PRIVATE_FILE, Storage, read_json, write_json, writing_file

if TYPE_CHECKING:
    from feast import FeatureStore, FeatureView
    from feast.repo_config import RepoConfig

LOCATION = "BEHAVIOR_FEATURE_STORE"
"""Environment variable that `feature_repo/` reads: absolute path of a home's feature store."""

VERSION = "BEHAVIOR_FEATURE_VERSION"
"""Environment variable that `feature_repo/` reads: the version whose views it defines."""

_importing = Lock()


def open_store(storage: Storage) -> FeatureStore:
    """Return Feast's store of a home, with the definitions of `feature_repo/` applied.

    Applying happens only if the definitions, the versions, Feast's release or the home's place have
    changed, or if a file is missing. Values that were published before stay where they are.

    Raises:
        PipelineError: if `feature_repo/` is not beside the package.
    """
    apply_definitions(storage)
    return _connect(_configuration(storage, _registry(storage)))


def apply_definitions(storage: Storage) -> None:
    """Make the registry what the definitions and the versions say, if it is not; see `open_store`.

    Raises:
        PipelineError: if `feature_repo/` is not beside the package, or the online store's server
            cannot be reached.
    """
    if not _is_applied(storage):
        with exclusive(storage):
            if not _is_applied(storage):
                _apply(storage)


def view_of(store: FeatureStore, view: str, version: int) -> FeatureView:
    """Return a view of a version; views that no checkpoint is behind have one version only.

    Raises:
        PipelineError: if there is no such version.
    """
    from feast.errors import FeatureViewVersionNotFound  # noqa: PLC0415 - see the module's docstring

    if view not in VERSIONED:
        return store.get_feature_view(view)
    try:
        found = store.registry.get_feature_view_by_version(view, store.project, version)
    except FeatureViewVersionNotFound:
        raise PipelineError(
            f"There is no version {version} of {view}.", "See `behavior-pipeline versions`."
        ) from None
    return cast("FeatureView", found)


def offline_folder(storage: Storage, view: str, version: int | None = None) -> Path:
    """Return where a view's history lies: `offline/<view>/v<N>/cutoff=YYYY-MM-DD/`.

    Args:
        storage: the home.
        view: name of the view; one that no checkpoint is behind has no folder `v<N>`.
        version: default the live one.
    """
    folder = storage.feature_store / "offline" / view
    if view not in VERSIONED:
        return folder
    return folder / f"v{version or read_versions(storage).live}"


def full_name(view: str, feature: str) -> str:
    """Return Feast's full name of a feature, `user_rfm__frequency`."""
    return f"{view}__{feature}"


def definitions_folder() -> Path:
    """Return the folder `feature_repo/` of this checkout.

    Raises:
        PipelineError: if it is missing.
    """
    folder = Path(__file__).parents[2] / "feature_repo"
    if not (folder / "feature_store.yaml").is_file():
        raise PipelineError(
            f"The feature definitions are missing: there is no {folder / 'feature_store.yaml'}.",
            "Install the pipeline from its checkout with `make`, or `pip install -e .`.",
        )
    return folder


def _location(storage: Storage) -> Path:
    return storage.feature_store.resolve()


def _registry(storage: Storage) -> Path:
    return _location(storage) / "registry.db"


def _online_file(storage: Storage) -> Path:
    return _location(storage) / "online.db"


def _applied_file(storage: Storage) -> Path:
    return _location(storage) / "applied.json"


def _fingerprint(storage: Storage) -> str:
    """Return a hash of all that the registry is made from; it holds absolute paths."""
    digest = hashlib.sha256(f"{version('feast')}\n{_location(storage)}\n".encode())
    digest.update(f"{online_place()}\n".encode())
    folder = definitions_folder()
    for path in [configuration_file(folder), *sorted(folder.glob("*.py"))]:
        digest.update(f"{path.name}\n{path.stat().st_size}\n".encode() + path.read_bytes())
    versions = read_versions(storage)
    digest.update(f"{_in_order(versions)}\n".encode())
    return digest.hexdigest()


def _in_order(versions: Versions) -> list[int]:
    """Return the numbers in the order in which they are applied: what comes last is served."""
    return [*sorted(set(versions.known) - {versions.live}), versions.live]


def _is_applied(storage: Storage) -> bool:
    """Say whether the registry on disk is the one that the definitions would make."""
    needed = [_registry(storage), _applied_file(storage)]
    needed += [_online_file(storage)] if has_online_file() else []
    if not all(path.exists() for path in needed):
        return False
    return bool(read_json(_applied_file(storage))["fingerprint"] == _fingerprint(storage))


def _apply(storage: Storage) -> None:
    """Build the registry anew beside the old one, make the online tables, swap it in.

    Feast writes a registry in place: a kill would leave half of one under the final name. Each
    version is applied with its own definitions, the live one last.
    """
    upgrade(storage, _online_file(storage))
    fingerprint = _fingerprint(storage)
    versions = read_versions(storage)
    known_version(versions, versions.live)
    if has_online_file():
        make_file(_online_file(storage))
    with writing_file(_registry(storage)) as aside, speaking_to_server():
        store = _connect(_configuration(storage, aside))
        for number in _in_order(versions):
            store.apply(_load_definitions(storage, number, is_live=number == versions.live))
        del store
        gc.collect()  # Feast closes its SQLite file no sooner
    if has_online_file():
        _online_file(storage).chmod(PRIVATE_FILE)
    write_json(_applied_file(storage), {"fingerprint": fingerprint})


def _connect(configuration: RepoConfig) -> FeatureStore:
    from feast import FeatureStore  # noqa: PLC0415 - see the module's docstring

    return FeatureStore(config=configuration)


def _configuration(storage: Storage, registry: Path) -> RepoConfig:
    """Read the chosen file for a home, as Feast does, without changing the environment."""
    from feast.repo_config import RepoConfig  # noqa: PLC0415 - see the module's docstring

    folder = definitions_folder()
    variables = os.environ | {LOCATION: str(_location(storage))}
    content = read_configuration(configuration_file(folder), variables)
    content["registry"]["path"] = str(registry)
    configuration = RepoConfig(**content)
    configuration.repo_path = folder
    return configuration


def _load_definitions(storage: Storage, version: int, *, is_live: bool) -> list[Any]:
    """Import the modules of `feature_repo/` for a home and return Feast's objects in them.

    Services that follow the live version are left out of the others.
    """
    from feast import Entity, FeatureService, FeatureView, FileSource  # noqa: PLC0415 - as above

    folder = definitions_folder()
    names = sorted(path.stem for path in folder.glob("*.py"))
    variables = {LOCATION: str(_location(storage)), VERSION: str(version)}
    with _importing, _variables(variables), _own_modules(folder, names):
        modules = [importlib.import_module(name) for name in names]
    kinds = (Entity, FeatureService, FeatureView, FileSource)
    found = [thing for module in modules for thing in vars(module).values()]
    things = {id(thing): thing for thing in found if isinstance(thing, kinds)}.values()
    return [
        thing
        for thing in things
        if is_live or not isinstance(thing, FeatureService) or thing.name.endswith(f"_v{version}")
    ]


@contextmanager
def _variables(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables for a moment."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _own_modules(folder: Path, names: list[str]) -> Iterator[None]:
    """Import from a folder first, and forget its modules afterwards.

    The definitions read their home's place when they are imported, and their names are plain:
    neither may stay behind for another home or another package.
    """
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)
