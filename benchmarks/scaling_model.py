"""What data-parallel pretraining costs on many GPUs, on paper: compute, gradient reduction, and how much of it backward hides.

    step_time(GpuCluster(64), model("large"), Load(tokens_per_second=315e3, tokens=8192, micro_batches=4)).seconds

A step computes its micro-batches; during the backward pass of the last one DistributedDataParallel reduces the gradients of one
bucket after the other as they become ready, and the optimizer waits for the last. The model plays exactly that, bucket by bucket.
Every constant has its source beside it; none of those of GPUs was measured by us.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from fastbert.train.settings import MODEL_PRESETS, ModelSize

from .workloads import VOCABULARY

POSITIONS, TYPES = 512, 2
MASKED_SHARE = 0.15
# torch's DistributedDataParallel: the first bucket of a backward pass is small, so that the network starts early.
FIRST_BUCKET_BYTES, BUCKET_BYTES = 1 << 20, 25 << 20
FORWARD_SHARE = 1 / 3  # a backward pass has two matmuls for each of the forward pass


@dataclass(frozen=True)
class Model:
    """A BertForPreTraining: ``parts`` are (parameters, FLOPs per token of forward and backward) in the order in which a backward
    pass finishes their gradients: heads, layers from the last to the first, and at the very end the embeddings, whose word
    embeddings are the masked-LM decoder's, too."""

    name: str
    parts: tuple[tuple[int, float], ...]

    @property
    def parameters(self) -> int:
        return sum(parameters for parameters, _ in self.parts)

    @property
    def flops_per_token(self) -> float:
        return sum(flops for _, flops in self.parts)


def model(name: str, sequence_length: int = 128) -> Model:
    """One of Google's published sizes with a vocabulary of 30,522, on full sequences."""
    size: ModelSize = MODEL_PRESETS[name]
    h, i = size.hidden_size, size.intermediate_size
    matmuls = 4 * h * h + 2 * h * i
    layer = matmuls + 4 * h + i + h + 4 * h  # biases of the Linears, two LayerNorms
    transform, pooler = h * h, h * h
    heads = (transform + h + 2 * h) + VOCABULARY + (pooler + h) + (2 * h + 2)
    # Six FLOPs per weight and token (Kaplan et al., 2020); scores and context: 4 * length * hidden forward, thrice in all.
    layer_flops = 6 * matmuls + 12 * sequence_length * h
    head_flops = 6 * MASKED_SHARE * (transform + VOCABULARY * h) + 6 * pooler / sequence_length
    embeddings = (VOCABULARY + POSITIONS + TYPES) * h + 2 * h
    return Model(name, ((heads, head_flops), *((layer, layer_flops),) * size.num_hidden_layers, (embeddings, 0.0)))


@dataclass(frozen=True)
class Load:
    """Of one GPU: ``tokens`` of a step in all, in ``micro_batches``, at ``tokens_per_second`` without communication and without
    the optimizer; ``gradient_bytes``: of an element as it is reduced; ``optimizer_seconds``: after the last gradient."""

    tokens_per_second: float
    tokens: float
    micro_batches: int = 1
    gradient_bytes: int = 4
    optimizer_seconds: float = 0.0


@dataclass(frozen=True)
class GpuCluster:
    """Nodes of eight H200, NVLink within, a 400 Gb/s port per GPU between them; bytes per second and seconds.

    ``bus_bandwidth``: NVLink's 900 GB/s (vendor) are 450 in each direction, of which rings get 370 (NVIDIA/nccl-tests#212, by a
    maintainer; NVLink SHARP's 480 are not counted on); eight ports of 400 Gb/s give 46 to 48 GB/s each (NVIDIA/nccl-tests#290),
    376 together, so one figure serves both. ``efficiency`` scales it, for networks that are worse.
    """

    gpus: int
    bus_bandwidth: float = 370e9
    efficiency: float = 1.0
    gpus_per_node: int = 8

    def all_reduce_seconds(self, size: float) -> float:
        """Of ``size`` bytes, the faster of ring and tree, with the latencies of NCCL's own model (src/graph/tuning.cc)."""
        if self.gpus == 1:
            return 0.0
        nodes = math.ceil(self.gpus / self.gpus_per_node)
        local = min(self.gpus, self.gpus_per_node)
        bandwidth = self.bus_bandwidth * self.efficiency
        steps, between = 2 * (self.gpus - 1), 2 * (nodes - 1)
        # Ring/Simple: 8.4 us, 3.4 us per step over NVLink, 9.6 us over the network. Tree/LL128: 4.4, 1.2 and 8.5 us; 0.9 x 0.915
        # of the bandwidth, half of it in each direction.
        ring = 8.4e-6 + (steps - between) * 3.4e-6 + between * 9.6e-6 + steps / self.gpus * size / bandwidth
        tree = 4.4e-6 + 2 * ((local - 1) * 1.2e-6 + math.log2(nodes) * 8.5e-6) + 2 * size / (0.9 * 0.915 * bandwidth)
        return min(ring, tree)


@dataclass(frozen=True)
class StepTime:
    """Seconds: ``compute`` of all micro-batches and the optimizer, ``communication`` if nothing hid it, ``exposed`` of it, what
    the optimizer waits for."""

    compute: float
    communication: float
    exposed: float

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed

    @property
    def efficiency(self) -> float:
        """Of a GPU in the group beside a GPU alone."""
        return self.compute / self.seconds


@dataclass(frozen=True)
class Bucket:
    """``size`` in bytes; ``ready``: the share of the backward pass after which its gradients are there."""

    size: int
    ready: float


def buckets(model: Model, gradient_bytes: int = 4) -> list[Bucket]:
    """As DistributedDataParallel rebuilds them after the first step: parameters in the order in which they become ready."""
    made, size, done = [], 0, 0.0
    for parameters, flops in model.parts:
        size += parameters * gradient_bytes
        done += flops / model.flops_per_token
        if size >= (BUCKET_BYTES if made else FIRST_BUCKET_BYTES):
            made.append(Bucket(size, done))
            size = 0
    return made + ([Bucket(size, done)] if size else [])


def step_time(all_reduce_seconds: Callable[[float], float], model: Model, load: Load, overlap: bool = True) -> StepTime:
    """``all_reduce_seconds``: of a number of bytes; without ``overlap`` the network waits for the end of the backward pass."""
    compute = load.tokens / load.tokens_per_second
    backward = (1 - FORWARD_SHARE) * compute / load.micro_batches
    network_free = 0.0
    communication = 0.0
    for bucket in buckets(model, load.gradient_bytes):
        seconds = all_reduce_seconds(bucket.size)
        communication += seconds
        network_free = max(network_free, bucket.ready * backward if overlap else backward) + seconds
    exposed = max(0.0, network_free - backward) if communication else 0.0
    return StepTime(compute + load.optimizer_seconds, communication, exposed)


def least_tokens(
    cluster: GpuCluster, model: Model, tokens_per_second: float, efficiency: float = 0.9, gradient_bytes: int = 4
) -> int:
    """Tokens that a GPU needs in a step of one micro-batch to reach ``efficiency``."""
    low, high = 1, 1 << 24
    while low < high:
        middle = (low + high) // 2
        load = Load(tokens_per_second, middle, gradient_bytes=gradient_bytes)
        if step_time(cluster.all_reduce_seconds, model, load).efficiency >= efficiency:
            high = middle
        else:
            low = middle + 1
    return low


def checkpoint_interval(checkpoint_seconds: float, failure_seconds: float) -> float:
    """Seconds between checkpoints that waste the least (Young, 1974): sqrt(2 x cost of a checkpoint x time between failures)."""
    return math.sqrt(2 * checkpoint_seconds * failure_seconds)


def wasted_share(interval: float, checkpoint_seconds: float, failure_seconds: float, restart_seconds: float) -> float:
    """Of the time: checkpoints, half an interval lost at a failure, and the restart."""
    return checkpoint_seconds / interval + (interval / 2 + restart_seconds) / failure_seconds
