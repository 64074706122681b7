"""What can go wrong on a device, named after what the reader can do."""


class AgentError(Exception):
    """Base of every error of the agent."""


class TransientError(AgentError):
    """Trying again may help, after `retry_after_s` seconds."""

    def __init__(self, message: str, *, retry_after_s: float = 5.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class StalledError(AgentError):
    """Retrying will not help: a person or a new release must act."""


class UnfitError(StalledError):
    """The release is for other devices; `version` is its number."""

    def __init__(self, message: str, *, version: int) -> None:
        super().__init__(message)
        self.version = version


class EngineError(StalledError):
    """This device cannot run the training engine of a version; its owner can change that."""


class RequestError(AgentError):
    """A caller asked for something that cannot be; `status` is the HTTP status that says so."""

    def __init__(self, message: str, *, status: int = 400) -> None:
        super().__init__(message)
        self.status = status
