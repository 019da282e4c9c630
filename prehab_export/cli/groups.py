"""Click commands whose help groups options, and the verbs of the program, under titles."""

import inspect
from collections.abc import Callable
from functools import reduce
from typing import Any

import click

Decorator = Callable[[Any], Any]
# Maps an unknown option, as the user wrote it, and the verb to advice; returns None if there is no advice.
Advice = Callable[[str, str], str | None]
DEFAULT_TITLE = "Folder and options"
# The help text of an option whose spelling is longer than this starts on the next line.
MAX_SPELLING_WIDTH = 26


class TitledOption(click.Option):
    """An option that the help shows under a title."""

    def __init__(self, *arguments: Any, title: str = DEFAULT_TITLE, **extra: Any) -> None:
        super().__init__(*arguments, **extra)
        self.title = title


class Verb(click.Command):
    """A command with titled options that gives advice on options it does not have."""

    def __init__(self, *arguments: Any, advice: Advice = lambda _option, _verb: None, **extra: Any) -> None:
        super().__init__(*arguments, **extra)
        self.advice = advice

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for option in self.get_params(ctx):
            if isinstance(option, click.Option) and (record := option.get_help_record(ctx)) is not None:
                sections.setdefault(getattr(option, "title", DEFAULT_TITLE), []).append(record)
        lengths = [len(spelling) for records in sections.values() for spelling, _ in records]
        width = max((length for length in lengths if length <= MAX_SPELLING_WIDTH), default=0)
        for title, records in sections.items():
            with formatter.section(title):
                # The padding aligns the help texts of all sections.
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
    """The program. Its help lists the verbs under titles, in the order of their registration."""

    command_class = Verb

    def __init__(self, *arguments: Any, **extra: Any) -> None:
        super().__init__(*arguments, **extra)
        self.titles: dict[str, str] = {}

    def verb(self, name: str, title: str, summary: str, **extra: Any) -> Decorator:
        """Return a decorator that registers a function as a command under a title.

        Args:
            summary: the command's text in the list of verbs.
            extra: further arguments of `click.Group.command`.
        """
        self.titles[name] = title
        return self.command(name=name, short_help=summary, **extra)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, self.titles))
        for title in dict.fromkeys(self.titles.values()):
            names = [name for name in self.titles if self.titles[name] == title]
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), self.commands[name].short_help or "") for name in names])


def titled_option(title: str, *names: str, **extra: Any) -> Decorator:
    """Return a decorator that adds an option under a title."""
    return click.option(*names, cls=TitledOption, title=title, **extra)


def chain(*decorators: Decorator) -> Decorator:
    """Combine decorators into one, the first outermost. The help lists options in this order."""
    return lambda command: reduce(lambda inner, outer: outer(inner), reversed(decorators), command)


def help_text(text: str, *examples: str) -> str:
    """Return the help of a command: its text, followed by example command lines that click does not rewrap."""
    return inspect.cleandoc(text) + "\n\n\b\nExamples:\n" + "\n".join(f"  prehab-export {line}" for line in examples)
