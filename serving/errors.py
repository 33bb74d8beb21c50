"""Errors for the user. Their message says what was found and what to do, without a traceback."""


class ServingError(Exception):
    """Base class of errors that are reported by their message alone."""


class PackageError(ServingError):
    """The folder of exported models is missing, incomplete or unreadable."""


class InputError(ServingError):
    """An invalid request: `field` names its faulty part, `code` the kind of error, `status` the HTTP status."""

    def __init__(self, message: str, *, field: str = "input", code: str = "invalid_value", status: int = 400) -> None:
        super().__init__(message)
        self.field = field
        self.code = code
        self.status = status
