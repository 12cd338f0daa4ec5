"""Why a request is refused."""

from http import HTTPStatus


class Refusal(Exception):  # noqa: N818 - it is an answer
    """A request is answered with an error.

    Attributes:
        status: the status of the answer.
        allow: the methods that the address takes, for the header of that name.
    """

    def __init__(self, status: HTTPStatus, message: str, allow: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.allow = allow


def unusable(message: str) -> Refusal:
    """The refusal of a request that is well formed, but cannot be answered."""
    return Refusal(HTTPStatus.UNPROCESSABLE_ENTITY, message)
