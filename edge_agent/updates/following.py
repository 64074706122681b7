"""Which release of its fleet a device follows.

Pure: what is signed, what the device is and what it runs go in; the release to bring it to comes out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from edge_agent.errors import UnfitError
from edge_agent.updates.targets import SignedTargets
from models.contract.manifest import FileEntry, ModelManifest
from models.contract.offer import build_release_target
from models.contract.terms import ReleaseTerms, Role
from models.contract.wave import Traits, find_unmet, is_in_wave


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """What one alias of the model stands for, as it is signed."""

    entry: FileEntry
    terms: ReleaseTerms


FindRelease: TypeAlias = Callable[[Role], Release | None]


def find_release(targets: SignedTargets, model: str, role: Role) -> Release | None:
    """Return what is signed for `role`, None if that is nothing; raises StalledError or MalformedError."""
    path = build_release_target(model, role)
    entry = targets.find_target(path)
    return None if entry is None else Release(entry=entry, terms=targets.parse_terms(path))


def choose_release(find: FindRelease, *, device_id: str, traits: Traits, active: str | None) -> Release | None:
    """Return the release that the device is to run; None lets it stay with what it runs.

    Args:
        find: Returns what a role stands for; may raise.
        device_id: Decides whether the device is in a wave.
        traits: What the device is.
        active: Digest of what it runs, if it runs anything.

    Raises:
        UnfitError: The release is for other devices.
    """
    champion = find("champion")
    if champion is None:
        return None
    chosen: Release | None = champion
    wave = champion.terms.wave
    if wave is not None and champion.entry.digest != active and not is_in_wave(device_id, wave):
        chosen = find("previous")
    if chosen is not None and chosen.entry.digest != active:  # what runs has been asked before
        check_requirements(chosen, traits)
    return chosen


def check_requirements(release: Release, traits: Traits) -> None:
    """Raise UnfitError if the terms of `release` ask for another device."""
    unmet = find_unmet(traits, release.terms.requirements)
    if unmet is not None:
        raise UnfitError(
            f"version {release.terms.version} is not for this device: {unmet}", version=release.terms.version
        )


def check_manifest(manifest: ModelManifest, *, model: str, traits: Traits) -> None:
    """Raise UnfitError if `manifest` is of another model, or for a runtime that is not installed here."""
    if manifest.model != model:
        unmet = f"it is a version of {manifest.model!r}, this device serves {model!r}"
    elif manifest.runtime not in traits.runtimes:
        unmet = f"it is for {manifest.runtime}, installed here is {' and '.join(traits.runtimes) or 'no runtime'}"
    else:
        return
    raise UnfitError(f"version {manifest.version} is not for this device: {unmet}", version=manifest.version)
