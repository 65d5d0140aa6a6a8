"""The tables of docs/scaling.md: what ``scaling_model`` says of base and large on 8 to 1,024 H200. Nothing here was measured by us.

    python -m benchmarks.scaling_tables

Tokens per second of one GPU are the goals of ``gpu_goals``; everything that communication adds is the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .gpu_goals import GOALS
from .scaling_model import GpuCluster, Load, Model, checkpoint_interval, least_tokens, model, step_time, wasted_share

GPUS = (8, 64, 256, 1024)
SIZES = ("base", "large")
# Tokens of a micro-batch: below these a GPU is not busy, above them nothing is gained (an assumption: not measured).
MICRO_BATCH_TOKENS = {"base": 65536, "large": 32768}
MEMORY_BANDWIDTH = 4.3e12  # of an H200, bytes per second
# Bytes per parameter: AdamW reads gradient, weight and two moments and writes three; the norm of the gradient reads it once more.
# LAMB writes its update first and reads weight and update for their norms.
ADAMW_BYTES, LAMB_BYTES = 28 + 4, 28 + 4 + 12
CHECKPOINT_BYTES = 12  # per parameter: the weight and two moments in float32
# 419 unexpected interruptions in 54 days on 16,384 H100 (Grattafiori et al., 2024, "The Llama 3 Herd of Models", 3.3.4).
GPU_SECONDS_PER_FAILURE = 54 * 24 * 3600 * 16384 / 419
COPY_BANDWIDTH = 25e9  # GPU to pinned host memory over PCIe 5.0 x16, whose 64 GB/s are a vendor's figure: an assumption
RESTART_SECONDS = 180.0  # new processes, imports, NCCL, the checkpoint read: an assumption


@dataclass(frozen=True)
class Phase:
    steps: int
    sequences: int
    length: int


@dataclass(frozen=True)
class Schedule:
    name: str
    optimizer_bytes: int
    phases: tuple[Phase, ...]

    @property
    def tokens(self) -> int:
        """Of full sequences."""
        return sum(phase.steps * phase.sequences * phase.length for phase in self.phases)


# Devlin et al. (2019), A.2: a million steps of 256 sequences, nine tenths of them with 128 tokens. You et al. (2020), "Large Batch
# Optimization for Deep Learning", table 1 and NVIDIA's split of its 8,601 steps.
BERT = Schedule("BERT, AdamW", ADAMW_BYTES, (Phase(900_000, 256, 128), Phase(100_000, 256, 512)))
LAMB = Schedule("LAMB, 64k/32k", LAMB_BYTES, (Phase(7_038, 65_536, 128), Phase(1_563, 32_768, 512)))
SCHEDULES = (BERT, LAMB)


def goal(size: str, length: int) -> float:
    """Tokens per second of one H200: a goal."""
    return next(goal.goal for goal in GOALS if goal.name == f"pretraining {size} S{length}")


def load(size: str, phase: Phase, gpus: int, optimizer_bytes: int, gradient_bytes: int = 4) -> Load:
    """Of one GPU where ``gpus`` share the sequences of a step evenly; there cannot be more of them than sequences."""
    tokens = phase.sequences / min(gpus, phase.sequences) * phase.length
    return Load(
        tokens_per_second=goal(size, phase.length),
        tokens=tokens,
        micro_batches=max(1, round(tokens / MICRO_BATCH_TOKENS[size])),
        gradient_bytes=gradient_bytes,
        optimizer_seconds=optimizer_bytes * model(size).parameters / MEMORY_BANDWIDTH,
    )


def phase_step(size: str, phase: Phase, cluster: GpuCluster, optimizer_bytes: int):
    shared = GpuCluster(min(cluster.gpus, phase.sequences), efficiency=cluster.efficiency)
    return step_time(shared.all_reduce_seconds, model(size, phase.length), load(size, phase, cluster.gpus, optimizer_bytes))


def training_seconds(size: str, schedule: Schedule, cluster: GpuCluster) -> float:
    return sum(phase.steps * phase_step(size, phase, cluster, schedule.optimizer_bytes).seconds for phase in schedule.phases)


def steps_table() -> Iterator[str]:
    yield "| | GPUs | tokens per GPU | compute, ms | all-reduce alone, ms | not hidden, ms | efficiency | at half the network |"
    yield "|---|---|---|---|---|---|---|---|"
    for size in SIZES:
        for schedule in SCHEDULES:
            phase = schedule.phases[0]
            for gpus in GPUS:
                step, slow = (phase_step(size, phase, GpuCluster(gpus, efficiency=e), schedule.optimizer_bytes) for e in (1.0, 0.5))
                tokens = load(size, phase, gpus, schedule.optimizer_bytes).tokens
                yield (
                    f"| {size}, {schedule.name}, {phase.sequences:,} x {phase.length} | {gpus:,} | {tokens:,.0f} | "
                    f"{1e3 * step.compute:,.1f} | {1e3 * step.communication:.1f} | {1e3 * step.exposed:.2f} | "
                    f"{step.efficiency:.0%} | {slow.efficiency:.0%} |"
                )


def time_table() -> Iterator[str]:
    yield f"| | tokens | {' | '.join(f'{gpus:,} GPUs' for gpus in GPUS)} |"
    yield f"|---|---|{'---|' * len(GPUS)}"
    for size in SIZES:
        for schedule in SCHEDULES:
            times = [duration(training_seconds(size, schedule, GpuCluster(gpus))) for gpus in GPUS]
            yield f"| {size}, {schedule.name} | {schedule.tokens / 1e9:.1f} G | {' | '.join(times)} |"


def limit_table() -> Iterator[str]:
    yield "| | GPUs | float32 gradients | bfloat16 gradients | float32, half the network |"
    yield "|---|---|---|---|---|"
    for size in SIZES:
        for gpus in GPUS:
            cells = [
                least_tokens(GpuCluster(gpus, efficiency=efficiency), model(size), goal(size, 128), gradient_bytes=gradient_bytes)
                for gradient_bytes, efficiency in ((4, 1.0), (2, 1.0), (4, 0.5))
            ]
            yield f"| {size} | {gpus:,} | {' | '.join(f'{cell:,}' for cell in cells)} |"


def input_table(loader_tokens_per_second: Callable[[int], float]) -> Iterator[str]:
    """``loader_tokens_per_second``: of one core, by the length of sequences."""
    yield "| | tokens/s of a node at the goal | cores of the kind measured here that make them |"
    yield "|---|---|---|"
    for size in SIZES:
        for length in (128, 512):
            rate = 8 * goal(size, length)
            yield f"| {size}, {length} | {rate / 1e6:.1f} M | {rate / loader_tokens_per_second(length):.1f} |"


def checkpoint_table(write_bytes_per_second: float) -> Iterator[str]:
    """``write_bytes_per_second``: of a checkpoint to the disk, sums and flushes included."""
    yield "| | bytes | copy to the host, s | write, s | GPUs | hours between failures | checkpoint every | lost time |"
    yield "|---|---|---|---|---|---|---|---|"
    for size in SIZES:
        for gpus in GPUS:
            parameters = model(size).parameters
            copy = CHECKPOINT_BYTES * parameters / COPY_BANDWIDTH
            write = CHECKPOINT_BYTES * parameters / write_bytes_per_second
            failure = GPU_SECONDS_PER_FAILURE / gpus
            # One is written while training goes on, so they cannot follow each other faster than they are written.
            interval = max(checkpoint_interval(copy, failure), write)
            yield (
                f"| {size} | {CHECKPOINT_BYTES * parameters / 1e9:.2f} GB | {copy:.2f} | {write:.1f} | {gpus:,} | "
                f"{failure / 3600:,.0f} | {duration(interval)} | {wasted_share(interval, copy, failure, RESTART_SECONDS):.2%} |"
            )


def sizes_table() -> Iterator[str]:
    yield "| | parameters | FLOPs per token, S128 / S512 | gradients | weights, gradients, AdamW | goal, tokens/s, S128 / S512 |"
    yield "|---|---|---|---|---|---|"
    for size in SIZES:
        short: Model = model(size)
        yield (
            f"| {size} | {short.parameters / 1e6:.1f} M | {short.flops_per_token / 1e6:,.0f} M / "
            f"{model(size, 512).flops_per_token / 1e6:,.0f} M | {4 * short.parameters / 1e6:,.0f} MB | "
            f"{16 * short.parameters / 1e9:.1f} GB | {goal(size, 128) / 1e3:,.0f}k / {goal(size, 512) / 1e3:,.0f}k |"
        )


def duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def main() -> None:
    for table in (sizes_table, steps_table, time_table, limit_table):
        print("\n".join(table()), end="\n\n")


if __name__ == "__main__":
    main()
