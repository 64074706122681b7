"""The versions a device answers with: a champion, perhaps a challenger beside it, changed under load.

A request keeps the version it began with until it is answered; the pair is one tuple, replaced whole.
"""

import hashlib
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from edge_agent.errors import RequestError
from edge_agent.inference.backend import Array
from edge_agent.inference.model import ServedModel
from edge_agent.inference.shadow import Shadow, ShadowSnapshot

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rivalry:
    """A challenger, and what it is for.

    Attributes:
        model: Answers whoever asks for its version, and:
        weight: This share of the requests that name no version, 0 to 1; by a hash of their key.
        shadow: Whether it is compared with each answer of the champion instead.
    """

    model: ServedModel
    weight: float = 0.0
    shadow: bool = False


class Engine:
    """Every loaded version of one model; its methods may be called from several threads."""

    def __init__(self, name: str, *, load_again: Callable[[], None] | None = None) -> None:
        """Begin with nothing loaded.

        Args:
            name: The model, whatever its version.
            load_again: Loads and activates the version on disk; None keeps callers from loading and unloading.
        """
        self.name = name
        self._rivalry: Rivalry | None = None
        self._load_again = load_again
        self._changing = threading.RLock()
        self._loaded: tuple[ServedModel, ...] = ()
        self._limit = 0  # of 2 ** 64: keys that hash below it are the challenger's
        self._shadow: Shadow | None = None
        self._rehearsal: Shadow | None = None
        self._mirrors: tuple[Shadow, ...] = ()

    @property
    def active(self) -> ServedModel | None:
        """The champion, None before the first activation."""
        loaded = self._loaded
        return loaded[0] if loaded else None

    def activate(self, model: ServedModel | None) -> None:
        """Make `model` the champion; the old one is released after the last request that holds it."""
        with self._changing:
            if self._shadow is not None:
                self._shadow.close()
            rivalry = self._rivalry if model is not None and self._may_challenge(model) else None
            self._shadow = Shadow(rivalry.model) if rivalry is not None and rivalry.shadow else None
            self._set_mirrors()
            self._limit = 0 if rivalry is None else round(rivalry.weight * 2**64)
            self._loaded = () if model is None else (model,) if rivalry is None else (model, rivalry.model)

    @property
    def rivalry(self) -> Rivalry | None:
        """What was last set, whether or not it fits the champion."""
        return self._rivalry

    def challenge(self, rivalry: Rivalry | None) -> None:
        """Set a challenger beside the champion, while both take and give the same tensors; None takes it away."""
        with self._changing:  # a champion that comes meanwhile is not undone
            self._rivalry = rivalry
            self.activate(self.active)

    def rehearse(self, shadow: Shadow | None) -> None:
        """Have `shadow` compared with the champion's answers too, until None takes it away; the caller ends it."""
        with self._changing:
            self._rehearsal = shadow
            self._set_mirrors()

    def list_models(self) -> tuple[ServedModel, ...]:
        """Return every loaded version, the champion first."""
        return self._loaded

    def select(self, name: str, version: str | None, *, key: str = "") -> ServedModel:
        """Return the version to answer with.

        Args:
            name: The model asked for.
            version: None lets the split decide.
            key: Requests of one key get the same version; without one it is the champion.

        Raises:
            RequestError: 404, there is no such model or version here; 503, nothing is loaded.
        """
        loaded = self._loaded
        if name != self.name:
            raise RequestError(f"model {name!r:.80} is not served here, {self.name!r} is", status=404)
        if not loaded:
            raise RequestError(f"no version of {name!r} is loaded: it waits for its first release", status=503)
        if version is None:
            is_challengers = self._limit and key and len(loaded) > 1 and _hash(key, loaded[1]) < self._limit
            return loaded[1] if is_challengers else loaded[0]
        for model in loaded:
            if model.version == version:
                return model
        served = " and ".join(model.version for model in loaded)
        raise RequestError(f"version {version!r:.80} of {name!r} is not loaded, {served} is", status=404)

    def mirror(self, model: ServedModel, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Have what is in the shadow compared with this answer of `model`, later; never blocks or raises."""
        for shadow in self._mirrors:
            if model is self.active:
                shadow.offer(inputs, outputs)

    def snapshot_shadow(self) -> ShadowSnapshot | None:
        """Return what the comparisons found since the champion became it; None without any."""
        shadow = self._shadow
        return None if shadow is None else shadow.snapshot()

    def is_ready(self, name: str | None = None, version: str | None = None) -> bool:
        """Return whether this model and version, or any, can answer now."""
        if name not in (None, self.name):
            return False
        return any(version in (None, model.version) for model in self._loaded)

    def load(self, name: str) -> None:
        """Load the version on disk again; may block.

        Raises:
            RequestError: 403, not configured; 404, another model.
            AgentError: It does not load; what was loaded answers on.
        """
        self._get_loader(name)()

    def unload(self, name: str) -> None:
        """Give back the memory of every version, until one is loaded; raises as `load`."""
        self._get_loader(name)
        self.activate(None)

    def _set_mirrors(self) -> None:
        self._mirrors = tuple(shadow for shadow in (self._shadow, self._rehearsal) if shadow is not None)

    def _get_loader(self, name: str) -> Callable[[], None]:
        if self._load_again is None:
            raise RequestError("loading and unloading is off: set [serving] repository = true", status=403)
        if name != self.name:
            raise RequestError(f"model {name!r:.80} is not served here, {self.name!r} is", status=404)
        return self._load_again

    def _may_challenge(self, champion: ServedModel) -> bool:
        if self._rivalry is None:
            return False
        ours, theirs = champion.manifest, self._rivalry.model.manifest
        if ours.version == theirs.version:
            log.warning("version %d is champion and challenger: it has nobody to be compared with", ours.version)
            return False
        if (ours.inputs, ours.outputs) != (theirs.inputs, theirs.outputs):
            log.warning("challenger %d takes or gives other tensors than %d: not used", theirs.version, ours.version)
            return False
        return True


def _hash(key: str, challenger: ServedModel) -> int:
    """Return a number below 2 ** 64; another challenger divides the same keys otherwise."""
    salt = challenger.version.encode()
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8, key=salt).digest()
    return int.from_bytes(digest, "big")
