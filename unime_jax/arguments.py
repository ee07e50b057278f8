"""Command lines of entries that take flags and no configuration."""

import argparse

from unime_jax.types import UserError


class Parser(argparse.ArgumentParser):
    """Reads flags; `--help` shows the description as it was written.

    Raises:
      UserError: what is wrong with a command line, in place of an end of the process.
    """

    def __init__(self, **options):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**options)

    def error(self, message: str):
        raise UserError(f"{message}; `{self.prog} --help` lists the flags")
