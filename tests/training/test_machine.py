import pytest
import torch

from manyform import ManyformError
from manyform.training import find_device, machine_facts
from manyform.training.machine import bf16_gains, resolve_precision


def test_facts_are_measured_once():
    facts = machine_facts("cpu")
    assert facts is machine_facts("cpu")
    assert facts.name
    assert facts.cores >= 1
    assert facts.memory_bytes > 0
    assert facts.fp32_gflops > 0
    assert facts.bf16_gflops > 0
    assert facts.peak_flops("fp32") == facts.fp32_gflops * 1e9
    assert facts.to_dict()["torch"] == torch.__version__


def test_measuring_leaves_the_random_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    machine_facts.cache_clear()
    bf16_gains.cache_clear()
    machine_facts("cpu")
    bf16_gains("cpu")
    assert torch.equal(torch.rand(1), expected)


def test_devices():
    assert find_device("cpu").type == "cpu"
    assert find_device("auto").type in ("cpu", "cuda")
    for bad in ("cuda:99", "toaster"):
        with pytest.raises(ManyformError, match=bad):
            find_device(bad)


def test_precision():
    cpu = torch.device("cpu")
    assert resolve_precision("fp32", cpu) == "fp32"
    assert resolve_precision("bf16", cpu) == "bf16"
    assert resolve_precision("auto", cpu) == ("bf16" if bf16_gains("cpu") else "fp32")
