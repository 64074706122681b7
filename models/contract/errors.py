"""What a document can have wrong with it."""


class ContractError(Exception):
    """A document is not what its topic, file name or sender says it is."""


class MalformedError(ContractError):
    """The bytes do not parse, or a field is missing, of the wrong type or out of range."""


class EnvelopeError(ContractError):
    """The document parses but must not be acted on: forged, stale, or meant for somebody else."""
