"""Options that several verbs have and that are no option of a run: its folder, and where its options come from."""

from pathlib import Path

import click

from prehab_export.cli.groups import decorated

common_options = decorated(
    click.option("-o", "--output", type=click.Path(path_type=Path), metavar="OUT", help="The run's folder."),
    click.option(
        "--config",
        "config_file",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        metavar="FILE",
        help="Options as YAML, in the shape of a saved run.yaml; they win over saved ones.",
    ),
    click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="KEY=VALUE",
        help="Any option by its name in the YAML file, such as truncate.floor_share=0.2; `prehab-export options` lists "
        "them. Repeat for more.",
    ),
    click.option(
        "--unset",
        multiple=True,
        metavar="KEY",
        help="Take a saved option, or a section of them, back to its default, such as quantize or prehab. Repeat for "
        "more.",
    ),
)
work_options = decorated(
    click.option("--force", is_flag=True, help="Do this verb's work again although it is up to date."),
    click.option(
        "--dry-run",
        is_flag=True,
        help="Only tell what would be done: ranks, sizes, memory, disk and time. Nothing is written.",
    ),
)
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
