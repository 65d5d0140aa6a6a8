"""``fastbert warmup``: compiles every Triton kernel that a model launches, before anything has to wait for it.

Nothing is launched: the kernels are compiled for the architecture of this machine's GPUs, or for that of GPUs that are elsewhere,
and stay in Triton's cache folder. What the first launch still does is load them.
"""

from __future__ import annotations

import importlib.util
import os
import time
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any

from fastbert.gpus import GPUS
from fastbert.train.settings import DEFAULT_VOCAB_SIZE, MODEL_PRESETS

from .command import DONE, FAILED, WRONG_USAGE, CommandFailure, CommandResult, Say

if TYPE_CHECKING:
    from triton.backends.compiler import GPUTarget

    from fastbert.ops.launches import Case, ModelShape
    from fastbert.ops.offline import Kernel


def warmup(
    model: str, dtypes: list[str], max_seq_length: int, inference: bool, targets: list[str], jobs: int | None, say: Say
) -> CommandResult:
    """Compiles and reports; ``targets``: names of :data:`fastbert.gpus.GPUS`, none for this machine's GPUs.

    Raises :class:`CommandFailure` for what cannot be compiled here at all.
    """
    unknown = [name for name in targets if name not in GPUS]
    if unknown:
        raise CommandFailure(f"--target {unknown[0]} is not known; known are {', '.join(GPUS)}", WRONG_USAGE)
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise CommandFailure("TRITON_INTERPRET=1 interprets kernels instead of compiling them: unset it", WRONG_USAGE)
    if importlib.util.find_spec("triton") is None:
        raise CommandFailure("the package triton, which compiles the kernels, is not installed (pip install triton; Linux only)")

    from fastbert.ops import launches, offline

    wrong = [name for name in dtypes if name not in launches.DTYPES]
    if wrong:
        raise CommandFailure(f"--dtype {wrong[0]} is not known; known are {', '.join(launches.DTYPES)}", WRONG_USAGE)
    gpus = [offline.target_of(name) for name in dict.fromkeys(targets)] or offline.targets_of_this_machine()
    if not gpus:
        raise CommandFailure(
            f"torch sees no GPU here: name the one to compile for, e.g. --target sm_90 (H100, H200); known are {', '.join(GPUS)}",
            WRONG_USAGE,
        )
    cases = launches.model_cases(model_shape(model), list(dict.fromkeys(dtypes)), max_seq_length, inference=inference)
    return _compile(cases, gpus, jobs or available_cores(), say)


def model_shape(model: str) -> ModelShape:
    """The numbers of a preset or of a checkpoint (folder or Hub name); OSError where there is none."""
    from fastbert.ops.launches import ModelShape

    if model in MODEL_PRESETS:
        size = MODEL_PRESETS[model]
        return ModelShape(size.hidden_size, size.num_attention_heads, size.intermediate_size, DEFAULT_VOCAB_SIZE)
    from transformers import BertConfig

    from fastbert.data.hub import no_waiting_for_the_hub

    with no_waiting_for_the_hub(model):
        found, _ = BertConfig.get_config_dict(model)
    if found.get("model_type") != "bert":
        raise CommandFailure(f"{model} holds a model of type {found.get('model_type')!r}; fastbert's kernels are those of 'bert'")
    config = BertConfig.from_dict(found)
    return ModelShape(**{name: getattr(config, name) for name in ModelShape.__dataclass_fields__})


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _compile(cases: list[Case], targets: list[GPUTarget], jobs: int, say: Say) -> CommandResult:
    from tqdm import tqdm
    from triton import knobs

    from fastbert.ops.offline import compiler_processes, in_parallel, target_name

    try:
        os.makedirs(knobs.cache.dir, exist_ok=True)
    except OSError as error:
        message = f"Triton's cache folder {knobs.cache.dir} cannot be made ({error.strerror}); TRITON_CACHE_DIR names another"
        raise CommandFailure(message) from error
    begin = time.perf_counter()
    tasks = [(case, target) for target in targets for case in cases]
    compiled, found, failures = 0, 0, []
    try:
        with compiler_processes(min(jobs, len(tasks))) as pool:
            listed = [kernel for kernels in in_parallel(_list_kernels, tasks, pool) for kernel in kernels]
            kernels = list({(kernel.target, kernel.name, kernel.key): kernel for kernel in listed}.values())
            with tqdm(total=len(kernels), desc="warmup", unit="kernel", disable=None) as bar:
                for cached, failure in in_parallel(_compile_one, kernels, pool):
                    found += cached
                    compiled += not cached and failure is None
                    failures += [failure] if failure else []
                    bar.update()
    except BrokenProcessPool as error:
        raise CommandFailure("a compiling process ended abruptly; if memory ran out, try --jobs 1") from error
    seconds = time.perf_counter() - begin

    names = [target_name(target) for target in targets]
    say(f"{', '.join(names)}: {len(kernels)} kernels, {compiled} compiled, {found} found in the cache, {seconds:.1f} s")
    say(f"cache folder: {knobs.cache.dir}")
    for failure in failures:
        say(f"not usable: {failure}")
    document: dict[str, Any] = {
        "targets": names,
        "kernels": len(kernels),
        "compiled": compiled,
        "found": found,
        "failures": failures,
        "seconds": round(seconds, 2),
        "cache_folder": knobs.cache.dir,
    }
    return CommandResult(document, FAILED if failures else DONE)


def _list_kernels(task: tuple[Case, GPUTarget]) -> list[Kernel]:
    from fastbert.ops.offline import kernels_of

    return kernels_of(*task)


def _compile_one(kernel: Kernel) -> tuple[bool, str | None]:
    """Whether it was in the cache, and what is wrong with it, if something is."""
    from fastbert.ops.offline import compile_kernel, target_name

    target = target_name(kernel.target)
    try:
        binary, cached = compile_kernel(kernel)
    except Exception as error:  # a compiler fails in many ways; the other kernels are still wanted
        return False, f"{kernel.name} for {target} ({kernel.case}): {type(error).__name__}: {error}"
    limit = GPUS[target].shared_per_block if target in GPUS else None
    if limit is not None and binary.metadata.shared > limit:
        return (
            cached,
            f"{kernel.name} for {target} ({kernel.case}) takes {binary.metadata.shared} bytes of shared memory of {limit}",
        )
    return cached, None
