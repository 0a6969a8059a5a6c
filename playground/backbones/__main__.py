"""Train and measure the tiny backbones of the built-in world, in the released layouts.

    python -m playground.backbones clips         --cache .cache/world --count 1536
    python -m playground.backbones video_vae     --cache .cache/world --minutes 40
    python -m playground.backbones audio_vae     --cache .cache/world --minutes 40
    python -m playground.backbones text          --minutes 8
    python -m playground.backbones video_latents --cache .cache/world --count 16384
    python -m playground.backbones audio_latents --cache .cache/world --count 3072
    python -m playground.backbones video_decoder --cache .cache/world --minutes 43
    python -m playground.backbones video_fold    --cache .cache/world --channels 16
    python -m playground.backbones video_tower   --cache .cache/world --minutes 120 --threads 2
    python -m playground.backbones audio_tower   --cache .cache/world --minutes 25
    python -m playground.backbones measure

in this order rebuild weights/playground/{wan,tangoflux}. A step runs on one CPU core unless it
says otherwise, and each measured number comes from clips of another seed than the training clips.
"""

import argparse
from pathlib import Path

import torch

COMMANDS = ("clips", "video_vae", "audio_vae", "text", "video_latents", "audio_latents",
            "video_decoder", "video_fold", "video_tower", "audio_tower", "measure")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m playground.backbones", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--cache", type=Path, default=Path(".cache/world"), help="arrays folder")
    parser.add_argument("--count", type=int, default=1536, help="training clips (clips, latents)")
    parser.add_argument("--channels", type=int, default=16, help="of the latents (video_fold)")
    parser.add_argument("--minutes", type=float, default=25.0, help="training time")
    parser.add_argument("--processes", type=int, default=2, help="for drawing clips")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--resume", action="store_true", help="go on from saved weights")
    return parser.parse_args()


def main() -> None:
    args = _parse()
    torch.set_num_threads(args.threads)
    if args.command == "clips":
        from playground.backbones.clips import TRAIN_SEED, build_cache

        build_cache(args.cache, TRAIN_SEED, args.count, args.processes)
    elif args.command == "video_vae":
        from playground.backbones import video_vae

        video_vae.train(args.cache, args.minutes, args.resume)
    elif args.command == "video_decoder":
        from playground.backbones import video_vae

        video_vae.train_decoder(args.cache, args.minutes)
    elif args.command == "video_fold":
        from playground.backbones import fold

        fold.run(args.cache, args.channels)
    elif args.command == "audio_vae":
        from playground.backbones import audio_vae

        audio_vae.train(args.cache, args.minutes)
    elif args.command == "text":
        from playground.backbones import text

        text.train(args.minutes)
    elif args.command == "measure":
        from playground.quality import measure

        measure.main()
    else:
        from playground.backbones import towers

        towers.run(args.command, args.cache, args.count, args.minutes, args.processes,
                   args.resume)


if __name__ == "__main__":
    main()
