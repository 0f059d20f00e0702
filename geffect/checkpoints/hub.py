"""Names in a hub of models, which may stand where a folder does."""

import math
import os
from pathlib import Path
from time import monotonic

REMEMBERED = 30.0
"""So many seconds a hub that did not answer is not asked for the same name again."""

_SILENT: dict[tuple[str, str], tuple[float, str]] = {}
"""When hubs did not answer for a name, and why."""


def only_cached(source: str | os.PathLike[str], file: str) -> bool:
    """Whether a name is to be read from the hub's cache alone, as the hub does not answer.

    - `file`: one that the model or tokenizer has.

    A hub that is silent is asked once for a name. transformers asks an absent one six times, in 23
    seconds, for one file after the other, and also for some of what the cache has.

    Raises FileNotFoundError where the cache does not know the name either, and for what is neither
    a folder nor such a name.
    """
    if Path(source).is_dir():
        return False
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    name = str(source)
    try:
        is_cached = try_to_load_from_cache(name, file) is not None
    except HFValidationError as error:
        raise FileNotFoundError(
            f"`{name}` should be a folder, or a name in the hub. Found no such folder, and it is "
            "no name. Check the path."
        ) from error
    silence = _silence_of(constants.ENDPOINT, name, file)
    if silence and not is_cached:
        raise FileNotFoundError(
            f"`{name}` should be a folder, or a name in the hub. Found no such folder, nothing "
            f"in the hub's cache, and no answer from the hub: {silence}. Check the path, or load "
            f"`{name}` once where there is a network."
        )
    return bool(silence)


def _silence_of(hub: str, name: str, file: str) -> str:
    """Why a hub does not answer when it is asked for a file; nothing where it does."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    since, why = _SILENT.get((hub, name), (-math.inf, ""))
    if monotonic() - since < REMEMBERED:
        return why
    try:
        get_hf_file_metadata(hf_hub_url(name, file, endpoint=hub))
    except HfHubHTTPError:
        return ""  # an answer, which transformers understands
    except Exception as error:  # of whichever library the hub is asked with
        why = str(error) or type(error).__name__
        _SILENT[hub, name] = monotonic(), why
        return why
    return ""
