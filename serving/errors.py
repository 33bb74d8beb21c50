"""Failures that a person can mend. Their text is one sentence for that person: what was found and what to do."""


class ServingError(Exception):
    """A failure that is told in its own words, without a traceback."""


class PackageError(ServingError):
    """The folder of exported models is missing, incomplete or unreadable."""


class InputError(ServingError):
    """A request that cannot be answered as it stands; `field` names its part and `code` the kind of problem."""

    def __init__(self, message: str, *, field: str = "input", code: str = "invalid_value", status: int = 400) -> None:
        super().__init__(message)
        self.field = field
        self.code = code
        self.status = status
