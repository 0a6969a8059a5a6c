"""Every attention kernel present here against a float64 softmax."""

import math

import pytest
import torch

from model.attention import Attention, flash_attn_installed


def available():
    """(kernel, device, dtype) of each kernel that can run on this machine."""
    cases = [("sdpa", "cpu", torch.float32), ("sdpa", "cpu", torch.bfloat16)]
    if torch.cuda.is_available():
        cases.append(("sdpa", "cuda", torch.bfloat16))
        if flash_attn_installed():
            cases.append(("flash_attn", "cuda", torch.bfloat16))
    return cases


@pytest.mark.parametrize(("kernel", "device", "dtype"), available())
def test_kernel_equals_softmax(kernel, device, dtype):
    torch.manual_seed(0)
    query = torch.randn(2, 7, 3, 16, device=device).to(dtype)
    key, value = torch.randn(2, 2, 11, 3, 16, device=device).to(dtype)
    attend = Attention(kernel)
    output = attend(query, key, value)
    logits = torch.einsum("bqhd,bkhd->bhqk", query.double(), key.double()) / math.sqrt(16)
    expected = torch.einsum("bhqk,bkhd->bqhd", logits.softmax(dim=-1), value.double())
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    assert output.dtype == dtype and attend.kernel == kernel
    torch.testing.assert_close(output.double(), expected, atol=tolerance, rtol=0)


def test_auto_resolves_once():
    attend = Attention("auto")
    assert attend.kernel is None
    assert attend.resolve(torch.device("cpu"), torch.float32) == "sdpa"
    assert attend.resolve(torch.device("cuda"), torch.bfloat16) == "sdpa"


@pytest.mark.parametrize(
    ("installed", "device", "dtype", "kernel"),
    [
        (True, "cuda", torch.bfloat16, "flash_attn"),
        (True, "cuda", torch.float32, "sdpa"),
        (True, "cpu", torch.bfloat16, "sdpa"),
        (False, "cuda", torch.bfloat16, "sdpa"),
    ],
)
def test_auto_takes_flash_where_it_can(monkeypatch, installed, device, dtype, kernel):
    monkeypatch.setattr("model.attention.flash_attn_installed", lambda: installed)
    assert Attention("auto").resolve(torch.device(device), dtype) == kernel


def test_an_absent_kernel_says_how_to_install(monkeypatch):
    monkeypatch.setattr("model.attention.flash_attn_installed", lambda: False)
    with pytest.raises(ImportError, match="pip install flash-attn.*attention=sdpa"):
        Attention("flash_attn")


def test_flash_needs_half_precision_on_a_gpu(monkeypatch):
    monkeypatch.setattr("model.attention.flash_attn_installed", lambda: True)
    with pytest.raises(ValueError, match="needs bfloat16 or float16 on a GPU"):
        Attention("flash_attn").resolve(torch.device("cpu"), torch.float32)


def test_unknown_kernel():
    with pytest.raises(ValueError, match="attention='xformers' is unknown; use one of auto"):
        Attention("xformers")
