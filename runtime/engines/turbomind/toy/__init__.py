"""TurboMind on a machine without a GPU: CUDA, NCCL and the model's maths replaced, nothing else.

What each file holds: host_cuda.c, host_driver.c, host_cublas.c and host_nccl.c (stand-ins for
NVIDIA's libraries on host memory), toy_model.cc over toy_abi.h (a language model that reads and
writes the real KV blocks), harness (all that, built and loaded), reference (the model in Python).
"""

from sagec.runtime.engines.turbomind.toy.harness import (
    Toy,
    ToyError,
    ToyStep,
    install,
    load_stand_ins,
)
from sagec.runtime.engines.turbomind.toy.reference import generate, next_token

__all__ = ["Toy", "ToyError", "ToyStep", "generate", "install", "load_stand_ins", "next_token"]
