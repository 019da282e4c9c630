"""Commands whose help has its options, and the program's verbs, under titles."""

import inspect
from collections.abc import Callable
from functools import reduce
from typing import Any

import click

Decorator = Callable[[Any], Any]
# (an option as it was spelled, the verb that does not have it) → what to say about that; None where nothing is known.
Advice = Callable[[str, str], str | None]
FOLDER = "Folder and options"
# An option that is spelled at more letters has its text below it.
WIDEST = 26


class TitledOption(click.Option):
    """An option that stands under a title in the help."""

    def __init__(self, *arguments: Any, title: str = FOLDER, **extra: Any) -> None:
        super().__init__(*arguments, **extra)
        self.title = title


class Verb(click.Command):
    """A command with titled options, and advice on those that it does not have."""

    def __init__(self, *arguments: Any, advice: Advice = lambda _option, _verb: None, **extra: Any) -> None:
        super().__init__(*arguments, **extra)
        self.advice = advice

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for option in self.get_params(ctx):
            if isinstance(option, click.Option) and (record := option.get_help_record(ctx)) is not None:
                sections.setdefault(getattr(option, "title", FOLDER), []).append(record)
        spelled = [len(spelling) for records in sections.values() for spelling, _ in records]
        width = max((length for length in spelled if length <= WIDEST), default=0)  # one column for all sections
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl([(spelling.ljust(width), text) for spelling, text in records], width)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            advice = self.advice(error.option_name, str(self.name))
            if advice is None:
                raise
            raise click.UsageError(f"No such option: {error.option_name}; {advice}", ctx) from error


class Verbs(click.Group):
    """The program: its verbs stand in the help under titles, in the order in which they were added."""

    command_class = Verb

    def __init__(self, *arguments: Any, **extra: Any) -> None:
        super().__init__(*arguments, **extra)
        self.titles: dict[str, str] = {}

    def verb(self, name: str, title: str, short: str, **extra: Any) -> Decorator:
        """Adds a function as a command under a title; ``short`` is what the list of verbs says of it."""
        self.titles[name] = title
        return self.command(name=name, short_help=short, **extra)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, self.titles))
        for title in dict.fromkeys(self.titles.values()):
            names = [name for name in self.titles if self.titles[name] == title]
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), self.commands[name].short_help or "") for name in names])


def titled(title: str, *names: str, **extra: Any) -> Decorator:
    """An option under a title."""
    return click.option(*names, cls=TitledOption, title=title, **extra)


def decorated(*decorators: Decorator) -> Decorator:
    """Several decorators as one, the first outermost: options stand in the help in this order."""
    return lambda command: reduce(lambda inner, outer: outer(inner), reversed(decorators), command)


def help_text(text: str, *examples: str) -> str:
    """A command's help: paragraphs, and command lines as they are."""
    return inspect.cleandoc(text) + "\n\n\b\nExamples:\n" + "\n".join(f"  prehab-export {line}" for line in examples)
