"""Which of these remote data sets can this machine not fetch the first small file of?

    python -m data.loading.reach s3://bucket/prefix ...

prints one line for each, and why; exits 1 if there is one. Run by cluster.preflight on every node.
"""

import sys
import tempfile
from pathlib import Path

from data.loading.sources import fetch
from data.schema import METADATA_FILE, DataError

SECONDS = 20.0  # of one attempt


def main(remotes: list[str]) -> int:
    if remotes[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    lost = False
    with tempfile.TemporaryDirectory() as folder:
        for number, remote in enumerate(remotes):
            address = f"{remote.rstrip('/')}/{METADATA_FILE}"
            try:
                fetch(address, Path(folder) / str(number), 1, SECONDS)
            except DataError as error:
                why = " ".join(str(error.__cause__).split())
                print(f"data.remote={remote} is not reachable ({why})")
                lost = True
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
