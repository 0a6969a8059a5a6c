"""Write down what a Slurm job does to its run, in RUN/events.jsonl.

    python -m cluster.record RUN job_start nodes=n[1-2] ranks=16 log=logs/x-7.out
    python -m cluster.record RUN job_end exit=137 stage=train

Called by launch/train.sbatch. Imports nothing heavy.
"""

import os
import sys
from pathlib import Path
from typing import Any

from common.events import KINDS, append_event, job_name

NUMBERS = ("ranks", "exit")


def main(arguments: list[str]) -> int:
    """Exit status 78 where it is not called so."""
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    try:
        run_dir, event, *pairs = arguments
        values: dict[str, Any] = dict(pair.split("=", 1) for pair in pairs)
        values |= {key: int(values[key]) for key in NUMBERS if key in values}
        missing = set(KINDS[event].keys) - set(values) - {"job"}
        if missing:
            raise ValueError(f"{event} needs {', '.join(sorted(missing))}")
    except (ValueError, KeyError) as error:
        print(f"error: {' '.join(arguments)}: {error}\n{__doc__}", file=sys.stderr)
        return 78
    append_event(Path(run_dir), event, **values | {"job": job_name(os.environ)})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
