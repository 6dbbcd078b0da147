"""Whether a server can be reached, said before a download that would try for a long time."""

from __future__ import annotations

import http.client
import threading
import urllib.error
import urllib.request

CONNECT_SECONDS = 1.5


def unreachable(url: str) -> str:
    """Why a server does not answer within CONNECT_SECONDS; empty when it does."""
    found: list[str] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=CONNECT_SECONDS).close()
            found.append("")
        except urllib.error.HTTPError as error:  # an answer all the same, but for a server or a proxy that is down
            found.append("" if error.code < 500 else str(error))
        except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: it is no address
            found.append(str(getattr(error, "reason", error)).strip())

    # looking up a name has no time limit of its own
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    return found[0] if found else f"no answer in {CONNECT_SECONDS:g} s"
