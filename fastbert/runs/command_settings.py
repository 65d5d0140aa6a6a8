"""What the settings of all commands share: to JSON and back, the shell command that asks for them, and checks by name."""

from __future__ import annotations

import dataclasses
import math
import shlex
from typing import Any, ClassVar, TypeVar

from .errors import SettingsError

LARGEST_SEED = 2**32 - 1  # that NumPy takes, whose generator transformers' set_seed sets, too

S = TypeVar("S", bound="CommandSettings")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommandSettings:
    """Settings that the options of ``command_name`` carry, under the same names; a tuple is an option with several values."""

    command_name: ClassVar[str]
    # Options about the folder that a run goes to, which are no part of what it does.
    not_in_command: ClassVar[tuple[str, ...]] = ("resume", "overwrite")
    least: ClassVar[dict[str, int]] = {}
    # What a run that is continued may be asked for differently, because it leaves the result alone.
    changeable_on_resume: ClassVar[frozenset[str]] = frozenset({"output", "device", "resume", "overwrite"})

    def check_least(self) -> None:
        """Raises :class:`SettingsError` for a number below what ``least`` says of its setting."""
        for name, least in self.least.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise SettingsError(f"{option(name)} is {value}; it must be at least {least}")

    def check_not_empty(self) -> None:
        """Raises :class:`SettingsError` for an empty text, which a shell makes of a variable that is not set.

        As a path it would be the folder that the command is called in.
        """
        for name, value in self.to_dict().items():
            if value == "" or (isinstance(value, list) and "" in value):
                raise SettingsError(f"{option(name)} is empty: give a value, or leave the option out")

    def check_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise SettingsError(f"{option(name)} is {value}; it must be a positive number")

    def check_not_negative(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise SettingsError(f"{option(name)} is {value}; it must be 0 or a positive number")

    def check_one_of(self, name: str, allowed: tuple[str, ...]) -> None:
        if getattr(self, name) not in allowed:
            raise SettingsError(f"{option(name)} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")

    def check_seeds(self, seeds: tuple[int, ...]) -> None:
        if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise SettingsError(f"--seeds is {' '.join(map(str, seeds)) or 'empty'}; it must be different numbers from 0 on")
        if max(seeds) > LARGEST_SEED:
            raise SettingsError(f"--seeds holds {max(seeds)}; the largest seed is {LARGEST_SEED}")

    def check_resume_or_overwrite(self) -> None:
        if self.resume and self.overwrite:
            raise SettingsError("--resume continues the run in the output folder, --overwrite deletes it: give one of them")

    def not_default(self, *names: str) -> list[str]:
        """Those of the settings ``names`` that are not left at their default."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return [name for name in names if getattr(self, name) != defaults[name]]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; ``from_dict`` reads it back."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls: type[S], values: dict[str, Any]) -> S:
        """Raises :class:`SettingsError` for names that this version does not know."""
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise SettingsError(f"settings of another version of fastbert: {', '.join(unknown)} are not known here")
        return cls(**values)

    @classmethod
    def refuse_changes(cls, output: str, settings: dict[str, Any], run_settings: dict[str, Any]) -> None:
        """Raises :class:`SettingsError` naming what a continued run asks for differently from the run in ``output``.

        ``settings``: the settings given now, all or some of them; ``run_settings``: all settings of the run so far.
        """
        changed = [
            f"{option(name)} was {run_settings.get(name)!r} and is now {value!r}"
            for name, value in settings.items()
            if name not in cls.changeable_on_resume and value != run_settings.get(name)
        ]
        if changed:
            raise SettingsError(f"cannot resume {output} with other settings: {'; '.join(changed)}")

    def command(self) -> str:
        """The shell command that asks for this run; settings at their default are left out."""
        words = ["fastbert", self.command_name]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value == field.default or field.name in self.not_in_command:
                continue
            words.append(option(field.name))
            if isinstance(value, tuple):
                words.extend(map(str, value))
            elif value is not True:
                words.append(str(value))
        return shlex.join(words)


def option(name: str) -> str:
    """The command-line option of a setting."""
    return "--" + name.replace("_", "-")
