"""Two processes that meet the same fault, the second one later: COORDINATOR NUMBER."""

import sys
import time

from unime_jax import runtime
from unime_jax.types import UserError


def main(argv: list[str]) -> None:
    del argv
    runtime.start()
    if not runtime.is_main():
        time.sleep(3)
    raise UserError(runtime.by_main(lambda: "what process 0 found is no good"))


place, number = sys.argv[1:3]
flags = [f"--coordinator={place}", "--processes=2", f"--process={number}"]
runtime.run_entry(main, ["failing", *flags])
