"""Lets ``./recipes/NAME.yaml`` be ``+recipe=NAME``: a folder of files as the config group ``recipe``.

Hydra finds this module in every application of the environment; it only adds the scheme ``recipes://``.
"""

from __future__ import annotations

import builtins

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigLoadError, ConfigResult

GROUP = "recipe"


class RecipeSource(FileConfigSource):
    """A recipe needs no package header: its keys stand at the top, like those of a command line."""

    @staticmethod
    def scheme() -> str:
        return "recipes"

    def available(self) -> bool:
        return super().is_group("")

    def load_config(self, config_path: str) -> ConfigResult:
        inside = _inside(config_path)
        if inside is None:
            raise ConfigLoadError(f"Config not found : {config_path}")
        result = super().load_config(inside)
        if result.header["package"] is None:
            result.header["package"] = "_global_"
        return result

    def is_group(self, config_path: str) -> bool:
        if config_path.strip("/") == "":
            return self.available()
        inside = _inside(config_path)
        return inside is not None and super().is_group(inside)

    def is_config(self, config_path: str) -> bool:
        inside = _inside(config_path)
        return bool(inside) and super().is_config(str(inside))

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        if config_path.strip("/") == "":
            return [] if results_filter == ObjectType.CONFIG else [GROUP]
        return super().list(_inside(config_path) or "", results_filter)

    def _list_add_result(
        self, files: builtins.list[str], file_path: str, file_name: str, results_filter: ObjectType | None
    ) -> None:
        super()._list_add_result(files, f"{GROUP}/{file_path}", file_name, results_filter)


def _inside(config_path: str) -> str | None:
    """The path below the folder; None for another group's."""
    head, _, rest = config_path.strip("/").partition("/")
    return rest if head == GROUP else None
