"""Hydra in, frozen configuration out. Hydra is imported by the functions that need it: --help and errors do without.

Hydra's own ``@hydra.main`` is not used: it composes everything twice and prints errors in its own way.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qbuild import schema
from qbuild.cli.args import Args
from qbuild.cli.translate import target_name, translated
from qbuild.errors import ConfigError

__all__ = ["Composer", "Job", "Task", "complete", "opened", "packaged"]

PACKAGES = (*schema.sections(), "targets")
PRIMARY = "qbuild"  # not `config`: ./conf may belong to another Hydra program
GROUPS = ("target", "model", "+recipe")  # as they are written on a command line

Task = Callable[[schema.Config], Any]  # runs a job and returns how it went


@dataclass(frozen=True)
class Job:
    """One composed configuration and the overrides it came from. ``volatile``: it holds a value taken from outside the
    configuration (an environment variable, the time), so the same words may mean another build tomorrow."""

    config: schema.Config
    overrides: tuple[str, ...]
    volatile: bool


@dataclass(frozen=True)
class Composer:
    """A started Hydra and the command line's overrides. ``folders`` is where configuration was looked for."""

    hydra: Any
    overrides: list[str]
    folders: tuple[Path, ...]

    def job(self) -> Job:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        with translated(self.overrides, self.names):
            config = self.hydra.compose_config(PRIMARY, self.overrides, RunMode.RUN)
            HydraConfig.instance().set_config(config)
            return _job(config, self.targets)

    def jobs(self) -> list[Job] | None:
        """The jobs of a multirun; None when a sweeper or launcher of the user's choice is to run it."""
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
        from hydra.core.override_parser.overrides_parser import OverridesParser
        from hydra.types import RunMode

        with translated(self.overrides, self.names):
            master = self.hydra.compose_config(PRIMARY, self.overrides, RunMode.MULTIRUN)
            sweeper, launcher = master.hydra.sweeper, master.hydra.launcher
            if not (sweeper._target_.endswith(".BasicSweeper") and launcher._target_.endswith(".BasicLauncher")):
                return None
            loader = self.hydra.config_loader
            words = [f"{k}={v}" for k, v in (sweeper.params or {}).items()] + list(master.hydra.overrides.task)
            parsed = OverridesParser.create(config_loader=loader).parse_overrides(words)
            batches = BasicSweeper.split_arguments(parsed, None)
            found = [loader.load_sweep_config(master, words) for batch in batches for words in batch]
            return [_job(config, self.targets) for config in found]

    def launch(self, task: Task) -> list[tuple[tuple[str, ...], Any]]:
        """A multirun through the user's sweeper and launcher, perhaps in other processes: overrides and outcomes."""
        with translated(self.overrides, self.names):
            found = self.hydra.multirun(
                PRIMARY, _Launched(task, self.targets), self.overrides, with_log_configuration=False
            )
        batches = found if isinstance(found, list) else []
        return [(tuple(job.overrides or ()), job.return_value) for batch in batches for job in batch]

    def show(self, args: Args) -> None:
        """``--cfg``, ``--info``, ``--hydra-help``: Hydra's own views of the configuration, printed by Hydra."""
        with translated(self.overrides, self.names):
            if "cfg" in args.options:
                package, resolve = args.options.get("package"), "resolve" in args.switches
                try:
                    self.hydra.show_cfg(PRIMARY, self.overrides, args.options["cfg"], package, resolve)
                except SystemExit:  # how Hydra says that there is no such package
                    remedy = schema.close(str(package), PACKAGES)
                    raise ConfigError("--package", f"there is no {package!r}", remedy) from None
            elif "info" in args.options:
                self.hydra.show_info(args.options["info"], PRIMARY, self.overrides)
            else:
                from hydra._internal.utils import get_args_parser

                self.hydra.hydra_help(PRIMARY, get_args_parser(), types.SimpleNamespace(overrides=[]))

    def plugin(self, shell: str) -> Any:
        """Hydra's completion plugin for a shell."""
        return self.hydra.get_shell_to_plugin_map(self.hydra.config_loader)[shell][0]

    def names(self, group: str) -> list[str]:
        """Everything that can be chosen in a config group, below its folders too."""
        return sorted(_options(self.hydra.config_loader, group, ""))

    @cached_property
    def targets(self) -> frozenset[str]:
        """The name each choice of a target has under ``targets``."""
        return frozenset(target_name(choice) for choice in self.names("target"))


@dataclass(frozen=True)
class _Launched:
    """What a launcher calls, perhaps after pickling it to another process."""

    task: Task
    targets: frozenset[str]

    def __call__(self, config: Any) -> Any:
        return self.task(_job(config, self.targets).config)


@contextmanager
def opened(args: Args, cwd: Path) -> Iterator[Composer]:
    """Hydra over the project's ./conf and ./recipes, then the packaged ones."""
    from hydra import version
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_config_search_path
    from hydra.core.config_search_path import SearchPathQuery
    from hydra.core.global_hydra import GlobalHydra

    conf, recipes = packaged()
    version.setbase("1.3")
    _register()
    path = create_config_search_path(f"file://{conf}")
    main = SearchPathQuery(provider="main")
    path.append("qbuild", f"recipes://{recipes}", anchor=main)
    project = [("recipes", cwd / "recipes"), ("file", cwd / "conf")]
    if "config_dir" in args.options:
        project.append(("file", Path(args.options["config_dir"]).absolute()))
    for scheme, folder in project:
        if folder.is_dir() and not folder.samefile(recipes if scheme == "recipes" else conf):
            path.prepend("project", f"{scheme}://{folder}", anchor=main)
    GlobalHydra.instance().clear()
    hydra = Hydra.create_main_hydra2("qbuild", path)
    try:
        yield Composer(hydra, list(args.overrides), (conf, recipes, *(folder for _, folder in project)))
    finally:
        GlobalHydra.instance().clear()


def packaged() -> tuple[Path, Path]:
    """The conf and recipes that came with this code: in the package, or at the top of the clone it runs from."""
    package = Path(__file__).parent.parent
    if (package / "_conf").is_dir():
        return package / "_conf", package / "_recipes"
    return package.parent / "conf", package.parent / "recipes"


def _job(config: Any, targets: frozenset[str]) -> Job:
    """``targets``: names that can be chosen."""
    from omegaconf import OmegaConf

    words = tuple(config.hydra.overrides.task) if "hydra" in config else ()
    plain = {key: config._get_node(key) for key in config if key != "hydra"}
    job = OmegaConf.create(plain, parent=config)
    volatile = re.search(r"\$\{[\w.]+:", OmegaConf.to_yaml(job)) is not None
    values = typing.cast(dict[str, Any], OmegaConf.to_container(job, resolve=True))
    return Job(schema.parse(values, targets), words, volatile)


def _options(loader: Any, group: str, prefix: str) -> Iterable[str]:
    from hydra.core.object_type import ObjectType

    yield from (prefix + name for name in loader.get_group_options(group, ObjectType.CONFIG))
    for folder in loader.get_group_options(group, ObjectType.GROUP):
        yield from _options(loader, f"{group}/{folder}", f"{prefix}{folder}/")


def _register() -> None:
    """The schema in Hydra's ConfigStore: defaults, and types for overrides. The values are checked by schema.parse."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(group="schema", name="config", node=_node(schema.Config), provider="qbuild")
    for name, target in schema.FORMATS.items():
        store.store(group="schema", name=name, node=_node(target), provider="qbuild")


def _node(cls: type) -> type:
    """A mutable twin of a frozen dataclass with the types OmegaConf knows (it makes frozen ones read-only)."""
    fields: list[Any] = []
    hints = typing.get_type_hints(cls)
    for field in (field for field in dataclasses.fields(cls) if field.name in schema.keys(cls)):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            node = _node(typing.cast(type, hint))
            fields.append((field.name, node, dataclasses.field(default_factory=node)))
        elif field.name == "targets":
            fields.append((field.name, dict[str, Any], dataclasses.field(default_factory=dict)))
        else:
            default = None if field.default is dataclasses.MISSING else field.default
            fields.append((field.name, _leaf(hint), dataclasses.field(default=default)))
    return dataclasses.make_dataclass(cls.__name__, fields)


def _leaf(hint: Any) -> Any:
    """OmegaConf has no unions but Optional of a plain type; the rest is Any and left to schema.parse."""
    plain = [a for a in typing.get_args(hint) if a is not types.NoneType] or [hint]
    return hint if len(plain) == 1 and plain[0] in (str, int, bool) else Any


def complete(composer: Composer, shell: str, line: str) -> list[str]:
    """Completions for a command line (without the program's name): Hydra's, and those of groups that have folders."""
    word = "" if not line or line.endswith(" ") else line.split()[-1]
    key, equals, _ = word.partition("=")
    if equals and key in GROUPS:
        return [f"{key}={name}" for name in composer.names(key.lstrip("+")) if f"{key}={name}".startswith(word)]
    found = composer.plugin(shell)._query(config_name=PRIMARY, line=line)
    return [*(f"{group}=" for group in GROUPS if not equals and group.startswith(word)), *filter(_wanted, found)]


def _wanted(completion: str) -> bool:
    """Hydra also offers its own groups, the schema's, and ours in spellings that do not work."""
    return not re.match(r"\+?(hydra|schema|recipe|model|target)(/|=|\.?$)", completion) or completion == "model."
