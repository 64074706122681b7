"""What can go wrong in the coordinator, named after what the operator can do."""


class ServerError(Exception):
    """Base of every error of the coordinator."""


class UsageError(ServerError):
    """The command or the configuration asks for something that cannot be; exit code 2."""


class DefinitionError(ServerError):
    """A model definition must be changed by its author before it can be packaged."""


class RunError(ServerError):
    """A run cannot go on; its parameters are unchanged since the last completed round."""


class OfflineKeyError(ServerError):
    """A key that is kept offline is needed: run the command where that key is."""
