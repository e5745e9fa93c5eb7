"""Builds the compiled operators (torch.ops.gaitfast.*) and maps kernels/ to gaitfast.kernels.

GAITFAST_BUILD=0 skips the extension: everything then runs on the plain PyTorch and NumPy paths.
"""

import os
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
PACKAGES = ["gaitfast", "gaitfast.kernels", "gaitfast.kernels.triton_ops"] + [
    f"gaitfast.{folder.name}" for folder in sorted((ROOT / "gaitfast").iterdir()) if (folder / "__init__.py").exists()
]


def extension() -> dict:
    """CPU sources always; CUDA sources when this torch was built for CUDA and a toolkit is there (no GPU needed)."""
    if os.environ.get("GAITFAST_BUILD", "1") == "0":
        return {}
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

    sources = ["csrc/library.cpp", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cpu").rglob("*.cpp"))]
    # Compiled for OpenMP, not linked with it: at::parallel_for finds the library that PyTorch has loaded, and shares
    # its threads. A second pool beside them would spin against it (a third of the step on two cores).
    # No contraction: error-free transformations (csrc/cpu/retrieval) say themselves where they want a fused product.
    # -Wno-psabi: functions on vectors are all inlined, so how they would be passed does not matter.
    rounding = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    openmp = ["-fopenmp"] if torch.backends.openmp.is_available() else []
    flags = {"cxx": ["-O3", "-std=c++20", "-Wall", "-Wno-psabi", *rounding, *openmp]}
    cuda = torch.version.cuda is not None and CUDA_HOME is not None
    cuda_sources = sorted(
        str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cuda").rglob("*") if p.suffix in (".cpp", ".cu")
    )
    if cuda and cuda_sources:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0")
        kind, sources, flags["nvcc"] = CUDAExtension, sources + cuda_sources, ["-O3", "-std=c++20"]
    else:
        kind = CppExtension
    module = kind(
        "gaitfast._C",
        sources,
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args=flags,
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


setup(
    name="gaitfast",
    version="0.1.0",
    description="Diffusion pretraining of gait-recognition backbones, fast",
    python_requires=">=3.10",
    packages=PACKAGES,
    package_dir={"gaitfast": "gaitfast", "gaitfast.kernels": "kernels"},
    package_data={"gaitfast": ["assets/*.safetensors"], "gaitfast.report": ["*.css"]},
    install_requires=[
        "torch>=2.6",
        "deepspeed>=0.18.1",
        "nvidia-dali-cuda130>=1.50; platform_system=='Linux'",
        "einops>=0.7",
        "numpy>=1.26",
        "safetensors>=0.4",
        "opencv-python-headless>=4.8",
        "lz4>=4.3",
        "scipy>=1.11",
        "pyyaml>=6.0",
        "tqdm>=4.66",
        "matplotlib>=3.8",
        "tensorboard>=2.14",
    ],
    extras_require={
        "dev": [
            "pytest>=8.0",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "ruff>=0.6",
            "ninja",
            "triton>=3.6",
            "onnx>=1.17",
            "onnxscript>=0.5",
            "onnxruntime>=1.20",
        ],
        "gpu": ["triton>=3.6"],
        "onnx": ["onnx>=1.17", "onnxscript>=0.5", "onnxruntime>=1.20"],
        "bench": ["faiss-cpu>=1.8"],
    },
    entry_points={"console_scripts": ["gaitfast=gaitfast.cli:main"]},
    **extension(),
)
