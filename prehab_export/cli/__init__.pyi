from prehab_export.cli.entry import main as main
