"""Command-line options: `train`'s from `TrainConfig`; `--config FILE.yaml` and name suggestions for every verb."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from qcrd_fast.config import ELSEWHERE, TASKS, TrainConfig
from qcrd_fast.data.formats.registry import NAMES as FORMATS
from qcrd_fast.data.quantities import DECIMALS
from qcrd_fast.data.thinking import THINKING
from qcrd_fast.errors import InputError
from qcrd_fast.utils.config_files import read_yaml

METAVARS = {
    "data": "FILE",
    "eval_data": "FILE",
    "test_data": "FILE",
    "output_dir": "DIR",
    "student": "NAME_OR_PATH",
    "discriminator": "NAME",
    "prompt_template": "raw|chat|FILE",
    "device": "NAME",
    "resume": "auto|DIR",
    "system_prompt": "TEXT|FILE",
    "lora_target_modules": "NAMES",
    "run_name": "NAME",
    "discriminator_augment": "NAMES",
    "pool": "FILE",
    "prompts": "DIR",
    "teacher": "PATH|URL",
    "teacher_model": "NAME",
    "teacher_logprobs": "DIR",
}
_PATHS = re.compile("FILE|DIR|PATH|^(INPUT|RUN)")  # metavars of what may be the name of a file or folder
_CONFIG_KEY = "qcrd_fast.config_file"  # where ctx.meta holds what --config said of TrainConfig's fields
CONFIG_PATH = "qcrd_fast.config_path"  # and where the path of the file
_HELP_ALL = "qcrd_fast.help_all"  # and whether the help lists every option


class Group(click.Group):
    """A group that names the nearest verb."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            raise click.UsageError(f"unknown verb {name!r}{suggest(name, self.commands)}", ctx)
        return super().resolve_command(ctx, args)


class PathText(click.types.StringParamType):
    """A text that a shell completes as the name of a file or folder."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]


class Verb(click.Command):
    """A command whose help lists the options in groups; of `train`'s the usual ones alone, unless `--help-all` asks for
    all."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for param in self.params:
            if param.type is click.STRING and _PATHS.search((param.metavar or str(param.name)).upper()):
                param.type = PathText()

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        every, more = bool(ctx.meta.get(_HELP_ALL)), 0
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is None:
                continue
            if every or getattr(param, "usual", True):
                groups.setdefault(getattr(param, "group", "Options") if every else "Options", []).append(record)
            else:
                more += 1
        for group, records in groups.items():
            with formatter.section(group):
                formatter.write_dl(records, col_max=34)
        if more:
            formatter.write(f"\n  {more} more: {ctx.command_path} --help-all\n")


class ConfigOption(click.Option):
    """The option of one field of a config class."""

    def __init__(self, field: dataclasses.Field[Any], hint: Any, default: Any, hidden: bool):
        meta = field.metadata
        kind, *_ = [k for k in (typing.get_args(hint) or (hint,)) if k is not type(None)]
        can_be_none = field.default is not None and type(None) in typing.get_args(hint)
        flags = ["--" + name.replace("_", "-") for name in (field.name, *meta["aliases"])]
        if kind is bool:
            flags = [f"{flag}/--no-{flag[2:]}" for flag in flags]
        super().__init__(
            [field.name, *flags],
            type=_type(kind, meta, can_be_none),
            default=default,
            show_default=default is not None,
            hidden=hidden,
            metavar=METAVARS.get(field.name) or _metavar(kind, can_be_none),
            help=meta["help"],
        )
        self.group, self.usual = meta["group"], meta["usual"]

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Show name, a shorter alias and the default without `--help-all`; the text has the choices."""
        record = super().get_help_record(ctx)
        if record is None or ctx.meta.get(_HELP_ALL) or not self.usual:
            return record
        shorter = [flag for flag in self.opts[1:] if len(flag) < len(self.opts[0])]
        names, text = ", ".join([self.opts[0], *sorted(shorter, key=len)[:1]]), str(self.help)
        if isinstance(self.type, click.Choice):
            names, text = f"{names} NAME", f"{text}: {', '.join(map(str, self.type.choices))}"
        elif not self.is_flag:
            names = f"{names} {self.make_metavar(ctx)}"
        shown = self.show_default and self.default is not False
        return names, text + (f"  [default: {self.default}]" if shown else "")


class TrainOption(ConfigOption):
    """The option of one field of `TrainConfig`."""


class RareOption(click.Option):
    """An option that `--help-all` lists, but not `--help`."""

    usual = False


class _IntOrNone(click.IntRange):
    """An integer, or the word none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return None if value == "none" else super().convert(value, param, ctx)


class _FloatOrNone(click.FloatRange):
    """A number, or the word none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return None if value == "none" else super().convert(value, param, ctx)


class FiniteRange(click.FloatRange):
    """A number in a range; NaN, which is in every range, and infinity are refused."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


def _metavar(kind: type, can_be_none: bool) -> str | None:
    name = {int: "INT", float: "FLOAT"}.get(kind)
    return f"{name}|none" if name and can_be_none else name


def _type(kind: type, meta: Any, can_be_none: bool) -> click.ParamType:
    if meta["choices"]:
        return click.Choice(meta["choices"])
    if kind is int:
        return (_IntOrNone if can_be_none else click.IntRange)(meta["low"], meta["high"])
    if kind is float:
        return (_FloatOrNone if can_be_none else click.FloatRange)(meta["low"], meta["high"], min_open=meta["open_low"])
    return click.BOOL if kind is bool else click.STRING


def train_options(
    defaults: Mapping[str, Any] | None = None,
    hidden: Sequence[str] = (),
    only: Sequence[str] | None = None,
    help: Mapping[str, str] | None = None,
) -> Callable[[Any], Any]:
    """Decorator: every field of `TrainConfig`, or `only` these, as an option; `defaults` and `help` are shown instead
    of their own."""
    return config_options(TrainConfig, TrainOption, defaults, hidden, only, help)


def config_options(
    config: Any,
    kind: type[ConfigOption] = ConfigOption,
    defaults: Mapping[str, Any] | None = None,
    hidden: Sequence[str] = (),
    only: Sequence[str] | None = None,
    help: Mapping[str, str] | None = None,
) -> Callable[[Any], Any]:
    """Decorator: every field of a config class, or `only` these, as an option, with their help or this."""
    hints = typing.get_type_hints(config)

    def decorate(command: Any) -> Any:
        for field in reversed([f for f in dataclasses.fields(config) if only is None or f.name in only]):
            shown = (defaults or {}).get(field.name, field.default)
            option = kind(field, hints[field.name], shown, hidden=field.name in hidden)
            option.help = (help or {}).get(field.name, option.help)
            command.__dict__.setdefault("__click_params__", []).append(option)
        return command

    return decorate


def given_options(ctx: click.Context, config: Any) -> dict[str, Any]:
    """The values of a config class's options: of the command line, `--config`, or their defaults."""
    return {field.name: ctx.params[field.name] for field in dataclasses.fields(config)}


def given_train_options(ctx: click.Context) -> dict[str, Any]:
    """Return the fields of `TrainConfig` set by `--config` or the command line; defaults are left out."""
    values = dict(ctx.meta.get(_CONFIG_KEY, {}))
    for param in ctx.command.params:
        if isinstance(param, TrainOption) and ctx.get_parameter_source(str(param.name)) is ParameterSource.COMMANDLINE:
            values[str(param.name)] = ctx.params[str(param.name)]
    return values


def _load_config(ctx: click.Context, _: click.Parameter, path: str | None) -> None:
    if path is None:
        return
    values = read_yaml(path)
    options = {name: p for p in ctx.command.params for name in option_names(p)}
    train_values: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    for key, value in values.items():
        option = options.get(str(key).replace("-", "_"))
        if option is None:
            raise InputError(f"{path}: unknown option {key!r}{suggest(str(key), options)}")
        target = train_values if isinstance(option, TrainOption) else defaults
        name = str(option.name)
        if name in target:
            raise InputError(f"{path}: option {name!r} is given twice")
        if option.multiple and value is not None:
            given = [f"{k}: {v}" for k, v in value.items()] if isinstance(value, dict) else value
            target[name] = list(map(str, given if isinstance(given, list) else [given]))
            continue
        if value is None or isinstance(value, bool | str) or target is train_values:
            target[name] = value
        elif isinstance(value, dict) and getattr(option, "metavar", None) == "JSON":
            target[name] = json.dumps(value)
        elif isinstance(value, dict | list):
            raise InputError(f"{path}: --{name.replace('_', '-')} expects one value, got {value!r}")
        else:
            target[name] = str(value)
    ctx.meta[_CONFIG_KEY], ctx.meta[CONFIG_PATH] = train_values, path
    ctx.default_map = defaults


def option_names(param: click.Parameter) -> list[str]:
    """The names, underscored, by which `--config` may set this option."""
    if not isinstance(param, click.Option) or param.name in ("config", "help", "help_all"):
        return []
    return [flag.lstrip("-").replace("-", "_") for flag in param.opts if flag.startswith("--")]


def _show_all(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked and not ctx.resilient_parsing:
        ctx.meta[_HELP_ALL] = True
        click.echo(ctx.get_help(), color=ctx.color)
        ctx.exit()


help_all_option = click.option(
    "--help-all", is_flag=True, is_eager=True, expose_value=False, callback=_show_all, help="list every option and exit"
)
config_option = click.option(
    "--config",
    type=click.Path(),
    metavar="FILE.yaml",
    help="options as a YAML mapping; the command line overrides it",
    is_eager=True,
    expose_value=False,
    callback=_load_config,
)
dry_run_option = click.option("--dry-run", is_flag=True, help="check everything, write nothing, say what would be done")
json_option = click.option("--json", "as_json", is_flag=True, help="print JSON instead of text")
DEVICE_HELP = "auto, cpu, cuda, cuda:N"

natural = partial(click.option, type=click.IntRange(0), metavar="INT", show_default=True)
positive = partial(click.option, type=click.IntRange(1), metavar="INT", show_default=True)
format_option = click.option(
    "--format",
    type=click.Choice(FORMATS),
    metavar="NAME",
    default="auto",
    show_default=True,
    help=f"input format: {', '.join(FORMATS)}",
)


def input_options(command: Any) -> Any:
    """Decorator: how inputs are read, for the verbs that read samples."""
    for option in (
        click.option("--batch-input", metavar="FILE", help="input of the OpenAI batch whose output is read"),
        click.option(
            "--map",
            "mapping",
            metavar="NAME=KEY,...",
            help="which key is which, such as question=instruction,gold=answer",
        ),
        click.option("--config-name", metavar="NAME", help="configuration of a data set of the hub"),
        click.option("--split", metavar="NAME", help="only this split of the input, such as train or test"),
        format_option,
    ):
        command = option(command)
    return command


split_by_option = click.option(
    "--split-by",
    type=click.Choice(("majority", "gold")),
    default="majority",
    show_default=True,
    help="which answer makes a rationale positive",
)
task_option = click.option("--task", type=click.Choice(TASKS), help="answer type; default: guessed from the answers")
bad_row_option = click.option(
    "--on-bad-row",
    type=click.Choice(("error", "skip")),
    default="error",
    show_default=True,
    help="what to do with an unreadable row",
)


def reading_options(command: Any) -> Any:
    """Options of `prepare` for reading and showing replies."""
    for option in reversed(
        (
            click.option(
                "--thinking",
                type=click.Choice(THINKING),
                default="auto",
                show_default=True,
                help="reasoning blocks such as <think>; drop, keep: without or with them; only: they are the "
                "rationale; "
                "auto: only where the reply has no rationale outside of them",
            ),
            click.option(
                "--decimal",
                type=click.Choice(DECIMALS),
                default="point",
                show_default=True,
                help="how numbers are written: 1,234.5 (point) or 1.234,5 (comma)",
            ),
            click.option(
                "--tolerance",
                metavar="X",
                help="numbers that differ by no more are one answer; 0: exact; default: they agree rounded to 2 "
                "decimals or more",
            ),
            click.option(
                "--answer-regex",
                metavar="REGEX",
                help="a reply's answer: the first group of its last match, or all of that match",
            ),
            click.option(
                "--answer-reader",
                metavar="MODULE:FUNCTION",
                help="your (text, task, choices) -> the reply's answer, or None",
            ),
            natural("--show", default=0, help="questions to print, with what was read of each sample and why"),
            click.option("--inspect", metavar="FILE.html", help="the same as a page, of up to 200 questions"),
        )
    ):
        command = option(command)
    return command


device_option = click.option("--device", metavar="NAME", default="auto", show_default=True, help=DEVICE_HELP)
reasoning_option = click.option("--reasoning", is_flag=True, help="answer by reasoning first (`reason: x`)")


def suggest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?" for the closest known name, or an empty string; `-` and `_` count as the same.

    Among train's options also what an option of other trainers is here.
    """
    by_dashed = {k.lstrip("-").replace("_", "-"): k for k in known}
    if "learning-rate" in by_dashed and (told := ELSEWHERE.get(name.lstrip("-").replace("-", "_"))):
        return f"; {told}"
    close = difflib.get_close_matches(name.lstrip("-").replace("_", "-"), by_dashed, n=1, cutoff=0.5)
    return f"; did you mean {by_dashed[close[0]]!r}?" if close else ""
