"""Every test runs on the CPU, also where a GPU is present, with ninja on the PATH.

One thread per process: the tensors are tiny, and OpenMP threads that wait for a busy core made a
0.4 s encode take 13 s.
"""

import os
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
