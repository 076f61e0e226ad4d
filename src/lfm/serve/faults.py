"""What goes wrong, as a status and the JSON body that clients of OpenAI's protocol know."""

from __future__ import annotations

from typing import Any

from lfm.errors import AccessError, BudgetError, LfmError, RequestError


class Refused(Exception):
    """A request that is not served, with the status that says why."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = body(status, message, code, param)


def body(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """Return the body of an answer that is an error."""
    kinds = {401: "authentication_error", 403: "permission_error", 429: "insufficient_quota"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def refusal(error: Exception) -> Refused:
    """Return how an error is told to a client. Of a bug it learns no more than that there is one."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, AccessError):
        return Refused(403, str(error), "access")
    if isinstance(error, RequestError):
        return Refused(400, str(error))
    if isinstance(error, BudgetError):
        return Refused(429, str(error), "insufficient_quota")
    if isinstance(error, LfmError):
        return Refused(500, str(error), "model_failed")
    return Refused(500, "the server failed; its own output says how", "internal_error")
