"""Packages of two source roots (arc_ds, kernels/arc_kernels), the console script, and the extras."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def read_version() -> str:
    """The version that `arc_ds/version.py` states, read without importing it."""
    text = (ROOT / "arc_ds" / "version.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    if match is None:
        raise RuntimeError("arc_ds/version.py states no __version__")
    return match.group(1)


# Use of an export: compress, generate, export. Everything else is in an extra.
CORE = [
    "numpy>=1.26",
    "packaging>=24.0",
    "pyyaml>=6.0",
    "safetensors>=0.4.3",
    "sentencepiece>=0.2.0",
    "torch>=2.10",
    "tqdm>=4.66",
    "xxhash>=3.4",
]
EXTRAS = {
    # `arc-ds train` and `arc-ds shards`.
    "train": [
        "deepspeed>=0.19.6",
        "fsspec[http]>=2024.6",
        "matplotlib>=3.8",
        "mlflow>=3.0",
        "psutil>=5.9",
        "triton>=3.5; sys_platform == 'linux'",
        "webdataset>=1.0",
    ],
    # Readers of GGUF weights and of tokenizer.json and tiktoken files.
    "backbones": ["gguf>=0.17", "tiktoken>=0.8", "tokenizers>=0.21"],
    # The core with the readers of every decoder.
    "inference": ["arc-ds[backbones]"],
    "dev": [
        "hypothesis>=6.100",
        "llmlingua>=0.2.2",
        "mypy>=1.13",
        "openai>=1.50",
        "pytest>=8.2",
        "pytest-xdist>=3.6",
        "ruff>=0.8",
        "scipy>=1.11",
        "statsmodels>=0.14",
        "transformers>=5.0",
    ],
    # Shards behind s3://, gs://, abfs://, hf:// and sftp://, one package each. http(s) and `pipe:` need none of them.
    "remote": ["s3fs>=2024.6", "gcsfs>=2024.6", "adlfs>=2024.4", "huggingface_hub>=0.23", "paramiko>=3.4"],
    # `arc-ds serve`.
    "serve": ["aiohttp>=3.9", "fastapi>=0.115", "prometheus_client>=0.20", "uvicorn>=0.30"],
    # Inputs of `arc-ds shards build` that are Parquet or .zst.
    "shards": ["pyarrow>=16.0", "zstandard>=0.22"],
    # `arc-ds shards build --engine ray`, on one host or many.
    "ray": ["ray>=2.40"],
    # The writer step for datatrove pipelines.
    "datatrove": ["datatrove>=0.4"],
    # Decoders of families that our own transformer does not compute (`decoders[].implementation`).
    "transformers": ["transformers>=5.0"],
    # `arc-ds eval`.
    "eval": ["bm25s>=0.2", "pyarrow>=16.0", "rouge-score>=0.1.2", "sacrebleu>=2.4", "zstandard>=0.22"],
    # Needs no more than the core so far; the name is fixed.
    "store": [],
}

setup(
    name="arc-ds",
    version=read_version(),
    description="Training and use of ARC-Encoders: text compressed into a few vectors for a frozen decoder LLM",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["arc_ds", "arc_ds.*"]) + find_packages("kernels", include=["arc_kernels*"]),
    package_dir={"arc_kernels": "kernels/arc_kernels"},
    package_data={
        "arc_ds.planning": ["*.json"],
        "arc_ds.comparison": ["*.css", "*.js"],
        "arc_ds.evaluation.report": ["*.css", "*.js"],
        "arc_ds.pages": ["*.css", "*.js"],
    },
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["arc-ds = arc_ds.cli:main"]},
)
