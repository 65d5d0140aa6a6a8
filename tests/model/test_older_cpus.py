"""bfloat16 and int8 on a CPU that multiplies neither, as most laptops and many servers are."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fastbert.ops import native

# What oneDNN, torch and the extension then take for the CPU's own.
CPUS = {
    "avx2": {"FASTBERT_CPU_ISA": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    "avx512_vnni": {"FASTBERT_CPU_ISA": "avx512_vnni", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
}
SCRIPT = """
import copy, torch, transformers, fastbert
config = transformers.BertConfig(
    hidden_size=192, intermediate_size=768, num_hidden_layers=2, num_attention_heads=3, hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0, num_labels=2,
)
model = fastbert.BertForSequenceClassification(config).eval()
ids = torch.randint(1000, 2000, (8, 128))
mask = (torch.arange(128) < torch.tensor([128, 5, 77, 30, 128, 64, 1, 99])[:, None]).long()
batch = {"input_ids": ids, "attention_mask": mask}
with torch.no_grad():
    truth = model(**batch).logits
    for name, other in {
        "bfloat16": copy.deepcopy(model).bfloat16(), "int8": fastbert.quantize(copy.deepcopy(model)),
        "int8 under bfloat16": fastbert.quantize(copy.deepcopy(model)).bfloat16(),
    }.items():
        assert (other(**batch).logits.float() - truth).abs().max() < 0.02, name
        assert "one by one" not in str(fastbert.explain(other)), name
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(**batch).logits.float() - truth).abs().max() < 0.02
gradients = []
for dtype in (None, torch.bfloat16):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
        model(**batch, labels=torch.arange(8) % 2).loss.backward()
    gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.99
print("right")
"""


@pytest.mark.skipif(not native.AVAILABLE, reason=f"the native extension is not built: {native.unavailable_reason()}")
@pytest.mark.parametrize("cpu", CPUS)
def test_every_dtype_runs(cpu, tmp_path):
    if cpu not in native.supported_instruction_sets():
        pytest.skip(f"this CPU is less than {cpu}")
    environment = {**os.environ, **CPUS[cpu], "XDG_CACHE_HOME": str(tmp_path), "FASTBERT_CALIBRATION": "on"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.stdout == "right\n", done.stderr
