"""Whether the CUDA kernels run on the GPUs and with the driver that are there is known before one is launched."""

from __future__ import annotations

import pytest

from fastbert.ops.cuda import extension

DEFAULT = ["sm_80", "sm_90a", "sm_100"]


@pytest.mark.parametrize(
    ("built", "capabilities", "runs"),
    [
        (DEFAULT, [(8, 0)], True),
        (DEFAULT, [(8, 9)], True),
        (DEFAULT, [(9, 0)], True),
        (DEFAULT, [(12, 0)], True),  # by the PTX of the lowest
        (DEFAULT, [(7, 5)], False),
        (DEFAULT, [(7, 5), (9, 0)], True),
        (["sm_90a"], [(9, 0)], True),
        (["sm_90a"], [(8, 0), (10, 0)], False),  # what Hopper alone has goes to no other
        (["sm_90a", "sm_100"], [(8, 6)], False),
        (["sm_100"], [(9, 0)], False),
        (["sm_100"], [(10, 3)], True),
        (["sm_86"], [(8, 0)], False),
        ([], [(9, 0)], True),  # nobody knows
    ],
)
def test_which_gpus_a_build_runs_on(built, capabilities, runs):
    reason = extension.architecture_reason(built, capabilities)
    assert (reason is None) == runs
    if not runs:
        assert f"built for {', '.join(built)}" in reason and f"compute capability {capabilities[0][0]}." in reason


@pytest.mark.parametrize(
    ("runtime", "driver", "runs"), [(13000, 13020, True), (12090, 12040, True), (12040, 13000, True), (13000, 12080, False)]
)
def test_which_drivers_a_build_runs_with(runtime, driver, runs):
    """Within a major version of CUDA older drivers run newer runtimes."""
    reason = extension.driver_reason(runtime, driver)
    assert (reason is None) == runs
    if not runs:
        assert "built with CUDA 13.0, the GPU's driver is for 12.8" in reason


def test_the_reasons_of_this_installation(monkeypatch):
    """As if the module were for GPUs, and torch had found some."""

    class Built:
        RUNTIME_VERSION = 13000

        @staticmethod
        def driver_version():
            return driver

    monkeypatch.setattr(extension, "_import_error", None)
    monkeypatch.setattr(extension, "DEVICE_TYPE", "cuda")
    monkeypatch.setattr(extension, "extension", Built)
    monkeypatch.setattr(extension, "built_architectures", lambda: ["sm_100"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    driver = 12040
    assert "driver is for 12.4" in extension.unavailable_reason()
    driver = 13000
    assert "built for sm_100, the GPUs here have compute capability 9.0" in extension.unavailable_reason()
    monkeypatch.setattr(extension, "built_architectures", lambda: DEFAULT)
    assert extension.unavailable_reason() is None
