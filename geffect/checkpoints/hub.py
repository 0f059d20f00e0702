"""Names in a hub of models, which may stand where a folder does."""

import os
from pathlib import Path


def only_cached(source: str | os.PathLike[str], file: str) -> bool:
    """Whether a name is to be read from the hub's cache alone, as the hub does not answer.

    - `file`: one that the model or tokenizer has.

    It is asked once. transformers asks an absent hub six times, in 23 seconds, for one file after
    the other, and also for some of what the cache has.

    Raises FileNotFoundError where the cache does not know the name either.
    """
    if Path(source).is_dir():
        return False
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    name, cached = str(source), None
    try:
        cached = try_to_load_from_cache(name, file)
        get_hf_file_metadata(hf_hub_url(name, file))
    except HfHubHTTPError:
        return False  # an answer, which transformers understands
    except Exception as error:  # of whichever library the hub is asked with
        if cached is None:
            raise FileNotFoundError(
                f"`{name}` should be a folder, or a name in the hub. Found no such folder, nothing "
                f"in the hub's cache, and no answer from the hub: {error}. Check the path, or load "
                f"`{name}` once where there is a network."
            ) from error
        return True
    return False
