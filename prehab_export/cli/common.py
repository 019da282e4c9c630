"""The options that several verbs share and that are not options of a run, such as the run's folder."""

from pathlib import Path

import click

from prehab_export.cli.groups import chain

common_options = chain(
    click.option("-o", "--output", type=click.Path(path_type=Path), metavar="OUT", help="The run's folder."),
    click.option(
        "--config",
        "config_file",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        metavar="FILE",
        help="YAML file with options, in the format of a saved run.yaml; overrides saved options.",
    ),
    click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="KEY=VALUE",
        help="Set any option by its name in the YAML file, such as truncate.floor_share=0.2; `prehab-export options` "
        "lists them. Repeat for more.",
    ),
    click.option(
        "--unset",
        multiple=True,
        metavar="KEY",
        help="Reset a saved option or section to its default, such as quantize or prehab. Repeat for more.",
    ),
)
work_options = chain(
    click.option("--force", is_flag=True, help="Repeat the work of this verb even if it is up to date."),
    click.option(
        "--dry-run",
        is_flag=True,
        help="Only show what the command would do: ranks, sizes, memory, disk and time. Writes nothing.",
    ),
)
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
