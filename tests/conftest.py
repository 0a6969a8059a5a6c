"""Every test runs on the CPU, also where a GPU is present, with ninja on the PATH."""

import os
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
