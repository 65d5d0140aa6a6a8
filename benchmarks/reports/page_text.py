"""The words of docs/performance.md and of the machines' pages around their tables, in Markdown."""

from __future__ import annotations

from .agreement import BETWEEN_RUNS
from .losses import WORTH_IT
from .readme import MACHINE

MADE = "<!-- Made by `python -m benchmarks.reports.page` from benchmarks/results: change that, not this. -->"

HEAD = f"""\
{MADE}

# Performance

Every figure on this page and on those of the machines comes from a JSON document in
[benchmarks/results](../benchmarks/results), which names its machine, its versions and the command that made it; a test fails
where the pages and the documents differ. fastbert is measured beside the best that one could use instead, on the same weights
and batches, with outputs or losses compared before anything is timed."""

SUMMARY = """\
How many times as fast as transformers (sdpa) in the same dtype, with quartiles. transformers has no int8 on CPUs: that column
is against its float32. A machine's own page has more: what careful users of transformers and other engines reach, memory, the
share of what the machine can do, where the time goes, and every op on its own."""

OF_A_MACHINE = """\
[performance.md](../performance.md) says how to read the tables, sets all machines side by side and tells how to measure this
again."""

READING = f"""\
- **ms**: the median of the rounds, with the quartiles in brackets. Contenders take turns, each round in another order: what the
  machine does meanwhile meets all of them.
- **against transformers**: the median of the ratios of each round, transformers' time by the contender's, with quartiles. A
  ratio without quartiles is that of the two medians. 2x is half the time.
- **tokens/s, sequences/s**: of real tokens. Padding counts for nothing, whoever computes it.
- **MFU**, the share of the matmul rate: the FLOPs that the batch needs at the least, by the time, by the matmul rate that the
  same run measured at a shape of BERT's in the fastest library on that machine. Padding that is computed makes it smaller.
- **of the limit**: the least time by the time taken, where the least time is the roofline's, max(FLOPs / matmul rate, bytes /
  copy bandwidth). FLOPs and bytes: the formulas in [benchmarks/model_work.py](../benchmarks/model_work.py), for single ops in
  [benchmarks/work.py](../benchmarks/work.py). 100% is passed only by the error of the measured rates,
  by models so small that their weights stay in the caches, and by what computes less than the published model: before a masked-LM
  head fastbert's last layer goes on with the rows that are read.
- **memory**: the peak of a call or step beyond what is there before it (weights, the optimizer's state, the batch): of the
  whole process on CPUs, of torch's allocator on GPUs. Of inference it includes what a contender keeps between calls (packed
  weights, an engine's arena) in documents that have a table of contenders.
- **J**: energy of a call or step, where the machine tells it, of the whole package or card.
- **Where the time goes**: a run by kind of work, beside the floor of each part
  ([benchmarks/profile.py](../benchmarks/profile.py)).
- **Ops**: "both" is the forward pass and then the backward one; a contender's last column says how many times as fast fastbert's
  own choice was in the same rounds. Tensors that the caches still hold from the round before can reach more than 100% of the limit.
- **The stated spread** of a ratio, within which a rerun should find it: the largest of its interquartile range, the rerun's,
  and {BETWEEN_RUNS:.0%} of its median, by which whole runs differ. The quartiles are those of rounds within the same minutes.

Batches: `32 x 128` is 32 sequences of 128 tokens each; `MNLI lengths, padded to 128` is 32 sequences whose lengths are the
quantiles of that data set's, padded as its scripts pad ([benchmarks/workloads.py](../benchmarks/workloads.py)). Models named by
a size have random weights, which take the same time as trained ones."""

NOT_HELPING = f"""\
Known cases:

- **transformers' own code runs** with `attn_implementation="eager"`, `output_attentions`, 4D masks, in decoders with a cache,
  and in a layer that has a hook inside or is offloaded: the same numbers, not faster. `fastbert.explain(model)` names each
  case, and [compatibility.md](compatibility.md) has all of them.
- **Under `torch.compile` and `torch.export` with a padding mask** transformers' forward pass runs: how many tokens a mask leaves
  is not known there. Without padding, or on packed rows, fastbert's does. `torch.jit.trace` always gets transformers'.
- **Dense batches on Intel**: where nothing is padded, what is left to gain is a faster matmul, and torch's is nearly as fast
  there; with AMX the ops one by one may be faster than the encoder in one call, which is measured when a model first runs.
- **One short request**: on a few dozen tokens reading the weights and Python's share bound everybody. Serving engines that
  compile the whole model have less of the latter.
- **Other architectures** than BERT, RoBERTa, XLM-RoBERTa, CamemBERT and ELECTRA get the attention alone.

The rest of this section is computed from the results: every batch where fastbert is not the fastest contender of its dtype, or
is less than {WORTH_IT}x as fast as transformers, with both figures."""

NO_GPU = """\
**GPUs: not measured yet.** No document in benchmarks/results comes from one. The Triton kernels are tested in Triton's
interpreter and compiled ahead of time for four GPUs; `make gpu` measures everything on the one that is there."""

RERUN = f"""\
In a clone, with Python 3.10 or later and a C++ compiler; nothing else on the machine should be busy:

```
make bench-full   # every batch, contender and dtype: an hour and a half on two cores; make bench: ten minutes, fewer of each
.venv/bin/python -m benchmarks.reports.agreement benchmarks/results/{MACHINE} runs/bench
```

The reports (JSON, Markdown, pictures) are then in `runs/bench`. The second line sets your ratios beside the committed ones: each
with its quartiles, the difference, and whether it lies within the stated spread (above); exit code 1 where one does not. Another
kind of CPU has other ratios: a machine like one of those above should agree. One suite alone, of any model and batches, with a
report in any folder:

```
.venv/bin/fastbert bench --suite inference --model base --batches 32x128 mnli --output mine
```

To repeat a document on this page exactly, check out the commit that it names and run the command that it names; `--save FOLDER`
in it keeps the document in benchmarks/results/FOLDER. `python -m benchmarks.reports FOLDER` makes the reports of a folder of
documents again; `python -m benchmarks.reports.page` makes this page, `--check` says whether it is up to date."""
