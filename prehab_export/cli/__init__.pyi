from prehab_export.cli.commands import main as main
