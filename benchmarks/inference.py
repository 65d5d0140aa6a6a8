"""Encoder inference: fastbert beside transformers (sdpa) on the same weights and batches, with the matmul ceiling.

    python -m benchmarks.inference [--size base] [--rounds 5] [--dtype float32] [--device cpu] [--save FOLDER]

Outputs are compared before anything is timed. The last line of stdout is one JSON document; --save keeps it in
benchmarks/results/FOLDER.
"""

from __future__ import annotations

import argparse

import torch
import transformers

import fastbert

from .harness import interleaved, paired_ratio, summary, write_results
from .machine import ceilings, machine
from .workloads import BATCHES, SIZES, config_for, encoder_flops, padded_batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--save", metavar="FOLDER")
    arguments = parser.parse_args()
    device, dtype = arguments.device, getattr(torch, arguments.dtype)

    torch.manual_seed(0)
    config = config_for(arguments.size)
    theirs = transformers.BertModel(config, add_pooling_layer=False).eval().to(device, dtype)
    ours = fastbert.BertModel(config, add_pooling_layer=False).eval().to(device, dtype)
    ours.load_state_dict(theirs.state_dict())
    limits = ceilings(device, dtype)
    print(f"bert-{arguments.size}, {arguments.dtype}; matmul {limits['matmul_flops'] / 1e9:,.0f} GFLOP/s in this run")
    print(f"{'batch':<30}{'transformers':>14}{'fastbert':>12}{'ratio':>9}{'of matmul rate':>16}")

    results = {}
    with torch.inference_mode():
        for name, (lengths, padded_to) in BATCHES.items():
            batch = padded_batch(lengths, padded_to, device)
            difference = largest_difference(ours, theirs, batch)
            rounds = arguments.rounds * (10 if sum(lengths) < 100 else 1)
            seconds = interleaved(
                {
                    "transformers": lambda batch=batch: theirs(**batch).last_hidden_state,
                    "fastbert": lambda batch=batch: ours(**batch).last_hidden_state,
                },
                rounds,
                device,
            )
            ratio = paired_ratio(seconds["transformers"], seconds["fastbert"])
            medians = {key: summary(value) for key, value in seconds.items()}
            share = encoder_flops(config, lengths) / medians["fastbert"]["median_s"] / limits["matmul_flops"]
            results[name] = {**medians, "ratio": ratio, "share_of_matmul_rate": share, "largest_difference": difference}
            theirs_ms, ours_ms = (medians[key]["median_s"] * 1e3 for key in ("transformers", "fastbert"))
            print(f"{name:<30}{theirs_ms:>11,.1f} ms{ours_ms:>9,.1f} ms{ratio['median']:>8.2f}x{share:>15.0%}")
    document = {
        "machine": machine(device, dtype),
        "size": arguments.size,
        "dtype": arguments.dtype,
        "ceilings": limits,
        "results": results,
    }
    write_results("inference", document, arguments.save)


def largest_difference(ours: torch.nn.Module, theirs: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """On real tokens. Raises RuntimeError where the two do not compute the same: a benchmark of that would say nothing."""
    real = batch["attention_mask"].unsqueeze(-1)
    expected = theirs(**batch).last_hidden_state * real
    difference = (ours(**batch).last_hidden_state - expected).abs().max().item()
    allowed = 2e-5 if expected.dtype == torch.float32 else 0.3
    if not difference <= allowed:
        raise RuntimeError(f"outputs differ by {difference:.1e}, more than {allowed:.0e}: nothing is measured")
    return difference


if __name__ == "__main__":
    main()
