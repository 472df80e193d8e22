"""From what a user calls a model to a checkpoint: a path, a package's file, or a repository on the Hub."""

from __future__ import annotations

import fnmatch
import importlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from qbuild.checkpoint import (
    AUX,
    CONVERT,
    MAX_HEADER,
    PICKLES,
    TEMPLATES,
    Checkpoint,
    SourceFile,
    open_path,
    package_file,
    read_config,
    safetensors,
)
from qbuild.errors import InputError
from qbuild.inputs import exists

__all__ = ["open_source"]

HUB_ID = r"[A-Za-z0-9][\w.-]*/[\w.-]+"


def open_source(source: str, *, revision: str | None = None, fetch: bool = True, offline: bool = False) -> Checkpoint:
    """Open what ``source`` names. ``fetch=False``: of a Hub model only headers and small files are read."""
    if source.startswith("pkg://"):
        return open_path(package_file(source), source)
    path = Path(source).expanduser()
    if exists(path):
        return open_path(path.absolute(), source)
    if re.fullmatch(HUB_ID, source) and path.suffix != ".gguf":
        return _Hub(source, revision, offline).open(fetch)
    fact = "there is no such file or directory"
    raise InputError(source, fact, "model.source=DIRECTORY, FILE.gguf, pkg://PACKAGE/FILE, or a Hub id org/name")


class _Hub:
    """One repository at one commit. huggingface_hub reads HF_TOKEN, HF_ENDPOINT and its cache settings itself."""

    def __init__(self, repo: str, revision: str | None, offline: bool) -> None:
        self.repo, self.revision, self.offline = repo, revision, offline

    def open(self, fetch: bool) -> Checkpoint:
        from huggingface_hub import errors

        try:
            return self._fetched() if fetch or self.offline else self._headers()
        except errors.GatedRepoError:
            remedy = f"accept its terms at https://huggingface.co/{self.repo}, then set HF_TOKEN to a token of yours"
            raise InputError(self.repo, "is gated: your account has no access, or no token was sent", remedy) from None
        except errors.RepositoryNotFoundError:
            remedy = "check the spelling; a private repository needs HF_TOKEN"
            raise InputError(self.repo, "is not on the Hub, or is private", remedy) from None
        except errors.RevisionNotFoundError:
            raise InputError(
                self.repo, f"has no revision {self.revision!r}", "model.revision=BRANCH, TAG or COMMIT"
            ) from None
        except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
            remedy = "fetch it while online, or give a directory: model.source=DIRECTORY"
            raise InputError(self.repo, "is not in the local cache and the Hub cannot be asked", remedy) from None
        except errors.HfHubHTTPError as error:
            raise InputError(self.repo, f"the Hub answered with an error: {error}", "try again later") from None
        except (OSError, _transport_error()) as error:
            remedy = "check the network, or give a directory: model.source=DIRECTORY"
            raise InputError(self.repo, f"the Hub cannot be reached: {error}", remedy) from None

    def _fetched(self) -> Checkpoint:
        """Everything a build needs, in the Hub's own cache; the folder's name is the commit."""
        from huggingface_hub import snapshot_download

        patterns = ["*.safetensors", "model.safetensors.index.json", *AUX, TEMPLATES]
        folder = Path(
            snapshot_download(self.repo, revision=self.revision, allow_patterns=patterns, local_files_only=self.offline)
        )
        found = open_path(folder, self.repo)
        return replace(found, revision=folder.name)

    def _headers(self) -> Checkpoint:
        """Headers by range requests, small files whole: enough to plan."""
        from huggingface_hub import HfApi, hf_hub_download

        api = HfApi()
        info = api.model_info(self.repo, revision=self.revision, files_metadata=True)
        commit, names = info.sha, {s.rfilename: s.size or 0 for s in info.siblings or []}
        weights = sorted(n for n in names if n.endswith(".safetensors") and "/" not in n)
        if not weights:
            pickled = any(n.endswith(PICKLES) for n in names)
            fact = "only pickled weights" if pickled else "no safetensors in it"
            remedy = CONVERT.format(source=self.repo) if pickled else "choose another repository"
            raise InputError(self.repo, fact, remedy)
        aux = {
            name: Path(hf_hub_download(self.repo, name, revision=commit))
            for name in (*AUX, *fnmatch.filter(sorted(names), TEMPLATES))
            if name in names and name != "README.md"
        }
        if "config.json" not in aux:
            raise InputError(self.repo, "there is no config.json", "choose another repository")
        headers = [(SourceFile(Path(name), names[name]), self._header(name, commit)) for name in weights]
        config, config_file = read_config(aux["config.json"])
        return replace(safetensors(self.repo, None, headers, config, aux, commit), config_file=config_file)

    def _header(self, name: str, commit: str | None) -> tuple[int, Any]:
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

        url, headers = hf_hub_url(self.repo, name, revision=commit), build_hf_headers()

        def part(first: int, last: int) -> bytes:
            ranged = headers | {"Range": f"bytes={first}-{last}"}
            answer = get_session().get(url, headers=ranged, follow_redirects=True)
            hf_raise_for_status(answer)
            return bytes(answer.content[: last - first + 1])

        length = int.from_bytes(part(0, 7), "little")
        if length > MAX_HEADER:
            raise InputError(f"{self.repo}/{name}", "is no safetensors file", "choose another repository")
        try:
            return 8 + length, json.loads(part(8, 7 + length))
        except ValueError:
            raise InputError(f"{self.repo}/{name}", "its header is not JSON", "choose another repository") from None


def _transport_error() -> type[Exception]:
    """The error class of the HTTP library below huggingface_hub, which lets it out; that library changes."""
    from huggingface_hub import get_session

    library = importlib.import_module(type(get_session()).__module__.partition(".")[0])
    found: type[Exception] = library.HTTPError
    return found
