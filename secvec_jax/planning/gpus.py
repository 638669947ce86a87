"""NVIDIA GPUs that a step can be compiled for without one: the facts that XLA's compiler and the roofline need.

Sources: for A100, H100, H200 and B200, XLA's own descriptions (openxla/xla, xla/backends/gpu/target_config/specs); for
L4 and RTX 4090, NVIDIA's Ada architecture paper and data sheets, the CUDA programming guide's table for compute
capability 8.9, and the memory that nvidia-smi reports. Peaks are `model.flops.PEAK_FLOPS`, from the data sheets, as are
the interconnects: NVLink, or PCIe 4 x16 where there is none.
"""

import dataclasses
import re

from secvec_jax.errors import UserError
from secvec_jax.model.flops import PEAK_FLOPS
from secvec_jax.suggestions import suggestion

USABLE = 0.95
"""The share of a GPU's memory that a program can take, with `XLA_CLIENT_MEM_FRACTION=0.95`: CUDA and NCCL need some."""

GPUS_PER_HOST = 8


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Published figures of one GPU, in bytes, bytes/s and GHz."""

    name: str
    """in topologies: `h100:8`"""
    kind: str
    """JAX's `device_kind`"""
    capability: tuple[int, int]
    cores: int
    """streaming multiprocessors"""
    fpus_per_core: int
    threads_per_core: int
    shared_memory_per_core: int
    shared_memory_per_block: int
    """maximum, for a kernel that requests it"""
    l2_cache: int
    clock: float
    device_memory: int
    memory_bandwidth: float
    interconnect: float
    """to other GPUs of the host, in one direction"""

    @property
    def memory(self) -> int:
        """The bytes that a program can use."""
        return int(USABLE * self.device_memory)

    @property
    def peak(self) -> float:
        """FLOP/s in bfloat16, without sparsity."""
        return PEAK_FLOPS[self.kind]

    @property
    def target_config(self) -> str:
        """The GPU as XLA's `GpuTargetConfigProto`, in text."""
        major, minor = self.capability
        # Instructions that exist on this generation only, such as Hopper's products of matrices (sm_90a).
        extension = "ACCELERATED_FEATURES" if major in (9, 10) else "NONE"
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {self.threads_per_core}
              core_count: {self.cores} fpus_per_core: {self.fpus_per_core} clock_rate_ghz: {self.clock}
              shared_memory_per_block: 49152 shared_memory_per_core: {self.shared_memory_per_core}
              shared_memory_per_block_optin: {self.shared_memory_per_block}
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              memory_bandwidth: {int(self.memory_bandwidth)} l2_cache_size: {self.l2_cache}
              device_memory_size: {self.device_memory}
              cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
            }}
            platform_name: "CUDA" device_description_str: "{self.kind}"
            dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 13 }}
        """


_A100 = Gpu(
    name="a100-40",
    kind="NVIDIA A100-SXM4-40GB",
    capability=(8, 0),
    cores=108,
    fpus_per_core=64,
    threads_per_core=2048,
    shared_memory_per_core=167936,
    shared_memory_per_block=166912,
    l2_cache=40 << 20,
    clock=1.41,
    device_memory=42331013120,
    memory_bandwidth=1555.2e9,
    interconnect=300e9,
)
_A100_80 = dataclasses.replace(
    _A100, name="a100-80", kind="NVIDIA A100-SXM4-80GB", device_memory=85100068864, memory_bandwidth=2039.04e9
)
_H100 = Gpu(
    name="h100",
    kind="NVIDIA H100 80GB HBM3",
    capability=(9, 0),
    cores=132,
    fpus_per_core=128,
    threads_per_core=2048,
    shared_memory_per_core=233472,
    shared_memory_per_block=232448,
    l2_cache=50 << 20,
    clock=1.98,
    device_memory=84942979072,
    memory_bandwidth=3352.32e9,
    interconnect=450e9,
)
_H200 = dataclasses.replace(_H100, name="h200", kind="NVIDIA H200", device_memory=151397597184, memory_bandwidth=4800e9)
_B200 = dataclasses.replace(
    _H100,
    name="b200",
    kind="NVIDIA B200",
    capability=(10, 0),
    cores=148,
    l2_cache=132644864,
    clock=1.965,
    device_memory=191514411008,
    memory_bandwidth=7672.32e9,
    interconnect=900e9,
)
_RTX4090 = Gpu(
    name="rtx4090",
    kind="NVIDIA GeForce RTX 4090",
    capability=(8, 9),
    cores=128,
    fpus_per_core=128,
    threads_per_core=1536,
    shared_memory_per_core=102400,
    shared_memory_per_block=101376,
    l2_cache=72 << 20,
    clock=2.52,
    device_memory=24564 << 20,
    memory_bandwidth=1008e9,
    interconnect=32e9,
)
_L4 = dataclasses.replace(
    _RTX4090,
    name="l4",
    kind="NVIDIA L4",
    cores=58,
    l2_cache=48 << 20,
    clock=2.04,
    device_memory=23034 << 20,
    memory_bandwidth=300e9,
)
GPUS = {gpu.name: gpu for gpu in (_A100, _A100_80, _H100, _H200, _B200, _L4, _RTX4090)}
"""Name in topologies -> GPU."""

BY_KIND = {gpu.kind: gpu for gpu in GPUS.values()}
"""JAX's `device_kind` -> GPU."""


def names_gpus(topology: str) -> bool:
    """Whether a topology is one of GPUs, and not of TPUs, whose names are v4, v5e, v5p, v6e."""
    return re.match(r"v\d", topology) is None


def parse_gpus(topology: str) -> tuple[Gpu, int]:
    """Parse "h100:8" into (the GPU, 8); without a number it is one. Raises UserError for any other form."""
    name, colon, number = topology.partition(":")
    if name.lower() not in GPUS:
        longer = [known for known in GPUS if name and known.startswith(name.lower())]
        hint = f"use {' or '.join(longer)}" if longer else suggestion(name, GPUS)
        raise UserError(f"unknown GPU {name!r} ({hint}); TPU slices are named as in v5e:4x4")
    if not colon:
        return GPUS[name.lower()], 1
    count = int(number) if re.fullmatch(r"[1-9][0-9]{0,4}", number) else 0
    if count == 0 or (count > GPUS_PER_HOST and count % GPUS_PER_HOST):
        raise UserError(
            f"invalid topology {topology!r}: use {name}:N, with N from 1 to {GPUS_PER_HOST}, or a multiple of "
            f"{GPUS_PER_HOST} for several hosts"
        )
    return GPUS[name.lower()], count
