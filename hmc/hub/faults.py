"""What the hub's answers and the network's silence mean, in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
from huggingface_hub import constants, errors

from hmc.errors import HubError
from hmc.hub.names import HubName

_TOKEN = "set HF_TOKEN to a token that may read it"


@contextmanager
def told(name: HubName, what: str = "") -> Iterator[None]:
    """Whatever goes wrong with requests in the block becomes a `HubError`; `what` of the model they
    are for, where it is a file.
    """
    where = f"{name}: {what}" if what else str(name)
    try:
        yield
    except errors.OfflineModeIsEnabled:
        raise HubError(f"{where}: not on this machine, and HF_HUB_OFFLINE is set") from None
    except errors.HfHubHTTPError as error:
        raise HubError(f"{where}: {_refusal(name, error)}") from None
    except errors.FileMetadataError as error:
        raise HubError(f"{where}: {no_hub(str(error))}") from None
    except (httpx2.HTTPError, httpx2.InvalidURL, errors.LocalEntryNotFoundError) as error:
        cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else error
        reason = str(cause).partition("\n")[0] or type(cause).__name__
        raise HubError(f"{where}: {constants.ENDPOINT} cannot be reached: {reason}") from None


def no_hub(reason: str) -> str:
    """What to say of a server that answers, and not as it should."""
    return f"{constants.ENDPOINT} does not answer as a hub does: {reason}"


def _refusal(name: HubName, error: errors.HfHubHTTPError) -> str:
    hub, status = constants.ENDPOINT, error.response.status_code
    if isinstance(error, errors.GatedRepoError):
        return f"gated: accept its licence on {hub}/{name.repo}, and {_TOKEN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"not here, and {hub} has no such model; if it is a private one, {_TOKEN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{hub} has no revision {name.revision or constants.DEFAULT_REVISION} of it"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f"{hub} has no such file any more"
    if status == 401:
        return f"{hub} does not know the token (401): {_TOKEN}"
    if status == 403:
        return f"{hub} refuses it (403): accept its licence there, if it has one, and {_TOKEN}"
    if status == 429:
        return f"{hub} has had too many requests (429): wait, or set HF_TOKEN"
    said = (error.server_message or "").splitlines()
    return f"{hub} answers with {status}{f': {said[0]}' if said else ''}"
