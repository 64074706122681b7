"""Where an update stands: the machine's state, begun from what the disk says."""

from edge_agent.updates.download import list_needed
from edge_agent.updates.machine import Action, Event, Phase, UpdateState, advance
from edge_agent.updates.slots import Slots
from models.contract.manifest import GOLDEN_NAME


class Standing:
    """The state of one updater."""

    def __init__(self, slots: Slots, *, trains: bool) -> None:
        self._slots, self._trains = slots, trains
        self._state = self._load()

    @property
    def phase(self) -> Phase:
        return self._state.phase

    @property
    def target(self) -> str | None:
        return self._state.target

    def advance(self, event: Event) -> Action:
        """Return what to do after `event`."""
        self._state, action = advance(self._state, event)
        return action

    def reload(self) -> None:
        """Begin again from what the disk says."""
        self._state = self._load()

    def _load(self) -> UpdateState:
        """Return where the disk says that we are; a version that lacks files this device needs is not yet there."""
        active, trial = self._slots.active, self._slots.trial
        is_whole = active is not None and all(
            (active.directory / name).exists()
            for name in list_needed(active.manifest, trains=self._trains)
            if name != GOLDEN_NAME  # what serves has answered
        )
        return UpdateState(
            phase=Phase.IDLE if trial is None else Phase.STAGED,
            active=active.digest if active is not None and is_whole else None,
            target=None if trial is None else trial.digest,
            rejected=self._slots.rejected,
        )
