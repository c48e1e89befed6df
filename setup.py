"""Packaging. The folder `kernels/` is installed as `blockjax.kernels`.

A top-level package named `kernels` is never installed: that name belongs to
another project on PyPI.
"""

from setuptools import find_packages, setup

KERNELS = ["blockjax.kernels", *(f"blockjax.kernels.{p}" for p in find_packages("kernels"))]

setup(
    name="blockjax",
    version="0.1.0",
    description="Attention, recurrence and depth in blocks, for JAX on TPU and GPU",
    license="Apache-2.0",
    python_requires=">=3.12",
    packages=[*find_packages(include=["blockjax", "blockjax.*"]), *KERNELS],
    package_dir={"blockjax": "blockjax", "blockjax.kernels": "kernels"},
    install_requires=[
        "jax>=0.11.2,<0.13",
        "flax>=0.12.6",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "ml-collections>=1.1",
        "tensorflow-datasets>=4.9.10",
        "absl-py>=2.1",
        "array-record>=0.8",
        "importlib-resources>=6",  # imported by tensorflow-datasets, not declared by it
        "grain>=0.2.14",
        "tokenizers>=0.21",
        "sentencepiece>=0.2",
        "pyarrow>=18",
        "etils[epath]>=1.10",
        "filelock>=3.13",
        "jaxtyping>=0.3",
        "matplotlib>=3.9",
        "numpy>=2.0",
        "rich>=13",
        "tensorboardX>=2.6",
    ],
    extras_require={
        # jax-triton and Triton as they were measured together; later ones of either need others of the other.
        "cuda": ["jax[cuda13]>=0.11.2,<0.13", "jax-triton>=0.3.1,<0.4", "triton>=3.6,<3.7"],
        "tpu": ["jax[tpu]>=0.11.2,<0.13"],
        "gcs": ["gcsfs>=2024.6"],
        "slurm": ["submitit>=1.5"],
        # FlexAttention, a compiled decoder and fused_attnres, to compare with
        "bench": ["torch>=2.8", "fla-core>=0.6"],
        "dev": [
            "setuptools>=77",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.9",
            "submitit>=1.5",
            "jupytext>=1.16",
            "nbclient>=0.10",
            "ipykernel>=6.29",
            "triton>=3.6,<3.7; platform_system == 'Linux'",  # its interpreter
        ],
    },
)
