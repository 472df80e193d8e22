"""Where Hydra finds configuration: ./conf and ./recipes of the folder one works in, then what the package carries.

Acts in qbuild only: Hydra loads this in every application of the environment. Kept tiny, for it is loaded at each start.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult
from hydra.plugins.search_path_plugin import SearchPathPlugin

GROUP = "recipe"


class RecipeSource(FileConfigSource):
    """A folder of recipes seen as the config group ``recipe``: NAME.yaml is ``+recipe=NAME``."""

    @staticmethod
    def scheme() -> str:
        return "recipes"

    @staticmethod
    def _inside(config_path: str) -> str | None:
        """The path within the folder; None where it belongs to another group."""
        head, _, rest = config_path.partition("/")
        return rest if head == GROUP else None

    def load_config(self, config_path: str) -> ConfigResult:
        return super().load_config(self._inside(config_path) or config_path)

    def available(self) -> bool:
        return Path(self.path).is_dir()

    def is_group(self, config_path: str) -> bool:
        if not config_path:
            return True
        inside = self._inside(config_path)
        return inside is not None and (inside == "" or super().is_group(inside))

    def is_config(self, config_path: str) -> bool:
        inside = self._inside(config_path)
        return bool(inside) and super().is_config(str(inside))

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        if not config_path:
            return [GROUP] if results_filter in (None, ObjectType.GROUP) else []
        inside = self._inside(config_path)
        return [] if inside is None else super().list(inside, results_filter)


class QbuildSearchPath(SearchPathPlugin):
    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        mains: list[Any] = [e for e in search_path.get_path() if e.provider == "main"]
        if not mains or not (Path(mains[0].path.removeprefix("file://")) / "target" / "gguf").is_dir():
            return
        conf = Path(mains[0].path.removeprefix("file://"))
        shipped = conf.parent / ("_recipes" if conf.name == "_conf" else "recipes")
        main = SearchPathQuery("main", None)
        search_path.prepend("qbuild", f"recipes://{shipped}", main)
        here = Path.cwd()
        if here / "conf" != conf:
            search_path.prepend("project", f"file://{here / 'conf'}", main)
        if here / "recipes" != shipped:
            search_path.prepend("project", f"recipes://{here / 'recipes'}", SearchPathQuery("qbuild", None))
