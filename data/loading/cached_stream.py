"""Where a stream's shards are read from: in place, or through a cache on the node's own disk.

Called by data.loading.shards.
"""

import functools
import os
from pathlib import Path
from typing import IO, Any

from streaming import Stream
from streaming.base.world import World

from data.loading.agreement import agree
from data.loading.node import job_folder, lock_cache
from data.loading.sources import DataConfig, Opened, StreamConfig, needs_cache
from data.schema import DataError


class AtomicStream(Stream):
    """A stream whose files appear under their name only when they are whole, and only if good.

    Ranks, workers and other jobs may all be unpacking the same shard.
    """

    def _download_file(self, from_basename: str, to_basename: str | None = None) -> str:
        part = super()._download_file(from_basename, f"{from_basename}.{os.getpid()}.part")
        final = os.path.join(self.local, self.split, to_basename or from_basename)
        os.replace(part, final)
        return final

    def _decompress_shard_part(
        self, zip_info: Any, zip_filename: str, raw_filename: str, compression: str | None
    ) -> None:
        part = f"{raw_filename}.{os.getpid()}.part"
        try:
            super()._decompress_shard_part(zip_info, zip_filename, part, compression)
        except Exception:
            if self.remote is not None:  # a bad copy in the cache would be trusted next time
                Path(zip_filename).unlink(missing_ok=True)
            raise
        os.replace(part, raw_filename)


def open_stream(
    stream: StreamConfig, config: DataConfig, known: Opened, split: str
) -> AtomicStream:
    """Read in place, or through the cache: then the parent copies or downloads, and unpacks."""
    if not needs_cache(stream, config):
        return AtomicStream(local=stream.root, split=split)
    folder = _cache(config.cache_dir) / f"{known.label}-{known.version}"
    return AtomicStream(remote=stream.place, local=str(folder), split=split)


def _cache(cache_dir: str | None) -> Path:
    if cache_dir is None:
        return job_folder()
    _keep_lock(cache_dir)
    return Path(cache_dir)


@functools.cache
def _keep_lock(cache_dir: str) -> IO[str] | None:
    """Held until this process ends, by one rank of the node; all ranks learn of a refusal."""
    lock, problem = None, None
    if World.detect().is_local_leader:
        try:
            lock = lock_cache(Path(cache_dir))
        except DataError as error:
            problem = str(error)
    agree(problem, [])
    return lock
