"""Clips -> encoded shards, by any number of workers; `python -m data.prepare --help`.

encoding.py  the four frozen encoders, and what dataset.json says of their geometry
job.py       what there is to do: settings, groups of clips, receipts of what is done
work.py      one worker: decodes ahead, encodes, writes one shard per group
merge.py     the last step: verifies every shard and makes the data set visible
progress.py  how far all workers are, from files only
"""

from data.prepare.encoding import AUDIO_NEGATIVE, VIDEO_NEGATIVE, Encoders, build_metadata
from data.prepare.work import prepare

__all__ = ["AUDIO_NEGATIVE", "VIDEO_NEGATIVE", "Encoders", "build_metadata", "prepare"]
