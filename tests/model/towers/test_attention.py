"""Every attention kernel present here against a float64 softmax, forward and backward.

flash-attn 2, 3 and 4 cannot be built or run everywhere. Their call contract is tested against
stand-in packages with their layout, signature and return; the real kernels run where they are.
"""

import inspect
import math
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend

from model.joint import AVFullAttention
from model.towers.attention import (
    KERNELS,
    PACKAGES,
    QKV,
    SDPA_BACKENDS,
    Attention,
    fastest,
    installed,
)

CUDA = torch.device("cuda")
CASES = [("sdpa", "cpu", torch.float32), ("sdpa", "cpu", torch.bfloat16),
         ("sdpa_math", "cpu", torch.float32), ("sdpa_math", "cpu", torch.bfloat16),
         ("sdpa_flash", "cpu", torch.float32), ("sdpa_flash", "cpu", torch.bfloat16)]
if torch.cuda.is_available():
    CASES += [(kernel, "cuda", torch.bfloat16) for kernel in KERNELS[1:]
              if kernel not in PACKAGES or installed(kernel)]


def softmax_attention(query, key, value, bias=0.0):
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(query.shape[-1])
    return torch.einsum("bhqk,bkhd->bqhd", (logits + bias).softmax(dim=-1), value)


def inputs(dtype, device, num_query, num_key, heads=3, dim=16):
    torch.manual_seed(0)
    draws = (torch.randn(2, n, heads, dim).to(device, dtype) for n in (num_query, num_key, num_key))
    return [draw.requires_grad_() for draw in draws]


def compare(kernel, device, dtype, num_query, num_key, heads=3, dim=16):
    tensors = inputs(dtype, device, num_query, num_key, heads, dim)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    attend = Attention(kernel)
    output, expected = attend(*tensors), softmax_attention(*exact)
    assert output.dtype == dtype and output.shape == expected.shape and attend.kernel == kernel
    weights = torch.randn_like(expected)
    (output.double() * weights).sum().backward()
    (expected * weights).sum().backward()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    pairs = [(output, expected), *((a.grad, b.grad) for a, b in zip(tensors, exact, strict=True))]
    for ours, theirs in pairs:
        assert (ours.double() - theirs).norm() / theirs.norm() < tolerance


@pytest.mark.parametrize(("kernel", "device", "dtype"), CASES)
def test_kernel_equals_softmax_forward_and_backward(kernel, device, dtype):
    compare(kernel, device, dtype, 7, 11)


# Video, audio and text tokens of a clip of 2 s and of 5 s.
LENGTHS = [(780, 44, 65), (1860, 109, 65)]
SLICES = [slices for video, audio, text in LENGTHS for slices in (
    (video, video + audio), (audio, video + audio + text), (text, audio + text))]


@pytest.mark.parametrize(("num_query", "num_key"), [*SLICES, (780, 512)])
@pytest.mark.parametrize(("kernel", "device", "dtype"), CASES)
def test_kernel_at_the_papers_lengths(kernel, device, dtype, num_query, num_key):
    """The three slices of a joint block, and cross-attention to the video caption."""
    compare(kernel, device, dtype, num_query, num_key, heads=1, dim=128)


@pytest.mark.parametrize(("kernel", "device", "dtype"), CASES)
def test_avfull_attention_is_one_masked_softmax_on_every_kernel(kernel, device, dtype):
    num_video, num_audio, num_text = LENGTHS[0]
    torch.manual_seed(0)
    video, stream = (QKV(*torch.randn(3, 1, length, 2, 128).to(device, dtype))
                     for length in (num_video, num_audio + num_text))
    kind = torch.tensor([0] * num_video + [1] * num_audio + [2] * num_text, device=device)
    hidden = (kind[:, None] - kind).abs() == 2  # video and the audio caption
    bias = torch.zeros(len(kind), len(kind), dtype=torch.float64, device=device)
    union = (torch.cat(pair, dim=1).double() for pair in zip(video, stream, strict=True))
    expected = softmax_attention(*union, bias.masked_fill(hidden, -math.inf))
    outputs = AVFullAttention(Attention(kernel), "masked")(
        video, stream, num_audio, cross_modal=True)
    error = torch.cat(outputs, dim=1).double() - expected
    assert error.norm() / expected.norm() < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("kernel", ["sdpa", "sdpa_math", "sdpa_flash"])
def test_key_bias_is_added_to_the_logits(kernel):
    query, key, value = inputs(torch.float32, "cpu", 5, 9)
    bias = torch.linspace(-4, 0, 9)
    output = Attention(kernel)(query, key, value, bias)
    torch.testing.assert_close(output, softmax_attention(query, key, value, bias))


STAND_IN = '''
def flash_attn_func(q, k, v, {rest}):
    """The contract: (B, L, H, D) in half precision, softmax_scale by name, layout kept."""
    import torch
    assert q.dtype in (torch.float16, torch.bfloat16) and q.dtype == k.dtype == v.dtype
    assert q.shape[0] == k.shape[0] and q.shape[2:] == k.shape[2:] and k.shape == v.shape
    assert not causal and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    logits = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) * softmax_scale
    output = torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v.float()).to(q.dtype)
    return {returned}
'''
# Arguments after q, k, v as released, and what comes back.
SIGNATURES = {
    "flash_attn": ("dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), "
                   "softcap=0.0, alibi_slopes=None, deterministic=False, "
                   "return_attn_probs=False", "output"),
    "flash_attn_3": ("softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, "
                     "v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, "
                     "num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0",
                     "output, logits.logsumexp(-1)"),
    # 4.0.0b36
    "flash_attn_4": ("qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, "
                     "window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, "
                     "pack_gqa=None, deterministic=False, score_mod=None, score_mod_bwd=None, "
                     "mask_mod=None, aux_tensors=None, aux_scalars=None, "
                     "block_sparse_tensors=None, block_sparse_tensors_bwd=None, return_lse=False, "
                     "gather_bwd_recompute_p=False, gather_bwd_token_chunk=None",
                     "output, logits.logsumexp(-1) if return_lse else None"),
}
FILES = {
    "flash_attn": ("flash_attn/flash_attn_interface.py", "flash_attn/__init__.py"),
    "flash_attn_3": ("flash_attn_interface.py",),
    "flash_attn_4": ("flash_attn/cute/__init__.py", "cutlass/__init__.py"),
}


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Writes a package that looks like the released one and puts it on the path."""

    def write(kernel):
        rest, returned = SIGNATURES[kernel]
        for name in FILES[kernel]:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(STAND_IN.format(rest=rest, returned=returned))
        monkeypatch.syspath_prepend(str(tmp_path))

    names = ("flash_attn", "flash_attn.cute", "flash_attn_interface", "cutlass")
    real = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    yield write
    for name in [name for name in sys.modules if name.startswith(("flash_attn", "cutlass"))]:
        del sys.modules[name]  # or the next test file would find it installed
    sys.modules.update(real)


@pytest.mark.parametrize("kernel", list(SIGNATURES))
def test_call_contract_of_the_flash_packages(stand_in, monkeypatch, kernel):
    stand_in(kernel)
    attend = Attention(kernel)
    query, key, value = inputs(torch.bfloat16, "cpu", 7, 11)
    monkeypatch.setattr(attend, "_choose", lambda device, dtype: kernel)  # as on a GPU
    joint = torch.cat((key, key), dim=1)[:, :11]  # a slice of keys, as AVFull-Attention's
    output = attend(query, joint, value)
    assert attend.kernel == kernel and output.shape == query.shape
    assert output.dtype == torch.bfloat16
    expected = softmax_attention(query.double(), key.double(), value.double())
    assert (output.double() - expected).norm() / expected.norm() < 1e-2
    biased = attend(query, key, value, torch.full((11,), -1.0))  # equal on all keys: no effect
    assert (biased.double() - expected).norm() / expected.norm() < 1e-2


@pytest.mark.parametrize("kernel", PACKAGES)
def test_installed_packages_have_the_stand_ins_signature(kernel):
    from model.towers.attention import _flash_attn_func

    if not installed(kernel):
        pytest.skip(f"NOT RUN: the package of {kernel} is absent; only its stand-in is tested")
    real = inspect.signature(_flash_attn_func(kernel)).parameters
    assert list(real)[:3] == ["q", "k", "v"] and real["softmax_scale"].default is None


def test_flash_attn_4_alone_is_not_flash_attn_2(stand_in):
    stand_in("flash_attn_4")
    assert installed("flash_attn_4") and not installed("flash_attn")


@pytest.fixture
def blackwell(stand_in, tmp_path, monkeypatch):
    """flash-attn 2 as its source installs it, with flash-attn 4's files, on a Blackwell GPU."""
    stand_in("flash_attn")
    cute = tmp_path / "flash_attn" / "cute" / "__init__.py"
    cute.parent.mkdir()
    cute.write_text("import cutlass\n")
    monkeypatch.setattr("model.towers.attention.compute_capability", lambda device: 10)
    monkeypatch.setattr("torch.backends.cudnn.version", lambda: 91400)
    return tmp_path


def test_the_files_of_flash_attn_4_inside_flash_attn_2_are_not_flash_attn_4(blackwell):
    assert installed("flash_attn") and not installed("flash_attn_4")
    attend = Attention("auto")
    assert attend.resolve(CUDA, torch.bfloat16) == "flash_attn"
    with pytest.raises(ImportError, match="not installed; run `pip install flash-attn-4`"):
        Attention("flash_attn_4")


def test_a_package_that_cannot_be_imported(blackwell):
    """As one built for another torch: `auto` goes on and says so, a wish for it is refused."""
    (blackwell / "flash_attn" / "__init__.py").write_text("import flash_attn_2_cuda\n")
    with pytest.warns(UserWarning, match="takes another kernel: attention='flash_attn' is"):
        assert Attention("auto").resolve(CUDA, torch.bfloat16) == "sdpa"
    with pytest.raises(ImportError, match="No module named 'flash_attn_2_cuda'.*pip install"):
        Attention("flash_attn").resolve(CUDA, torch.bfloat16)


def test_auto_resolves_once():
    attend = Attention("auto")
    assert attend.kernel is None
    assert attend.resolve(torch.device("cpu"), torch.float32) == "sdpa"
    assert attend.resolve(CUDA, torch.bfloat16) == "sdpa"


@pytest.mark.parametrize(
    ("capability", "cudnn", "present", "kernel"),
    [
        (8, 91900, {"flash_attn"}, "flash_attn"),
        (8, 91900, set(), "sdpa"),
        (9, 91900, {"flash_attn_3"}, "cudnn"),
        (9, 91400, {"flash_attn_3", "flash_attn"}, "flash_attn_3"),
        (9, 91400, set(), "sdpa"),
        (10, 91900, {"flash_attn_4"}, "flash_attn_4"),
        (12, 91900, set(), "cudnn"),
        (7, 91900, {"flash_attn"}, "sdpa"),
    ],
)
def test_auto_takes_the_fastest_available(monkeypatch, capability, cudnn, present, kernel):
    monkeypatch.setattr("model.towers.attention.compute_capability", lambda device: capability)
    monkeypatch.setattr("model.towers.attention.installed", lambda name: name in present)
    monkeypatch.setattr("model.towers.attention._flash_attn_func", lambda name: None)
    monkeypatch.setattr("torch.backends.cudnn.version", lambda: cudnn)
    assert fastest(CUDA) == kernel
    assert Attention("auto").resolve(CUDA, torch.float32) == "sdpa"
    assert Attention("auto").resolve(torch.device("cpu"), torch.bfloat16) == "sdpa"


@pytest.mark.parametrize("kernel", list(PACKAGES))
def test_an_absent_kernel_says_how_to_install(monkeypatch, kernel):
    monkeypatch.setattr("model.towers.attention.installed", lambda name: False)
    with pytest.raises(ImportError, match="(pip install|build it from).*attention=sdpa"):
        Attention(kernel)


@pytest.mark.parametrize("kernel", ["flash_attn", "flash_attn_3", "flash_attn_4", "cudnn"])
def test_gpu_kernels_need_half_precision_on_a_gpu(monkeypatch, kernel):
    monkeypatch.setattr("model.towers.attention.installed", lambda name: True)
    with pytest.raises(ValueError, match="needs bfloat16 or float16 on a GPU"):
        Attention(kernel).resolve(torch.device("cpu"), torch.float32)


def test_a_kernel_that_this_pytorch_lacks(monkeypatch):
    """PyTorch would say so at the first forward, and name neither the key nor a remedy."""
    Attention("sdpa_flash").resolve(torch.device("cpu"), torch.bfloat16)
    monkeypatch.setitem(SDPA_BACKENDS, "sdpa_flash", SDPBackend.CUDNN_ATTENTION)  # on no CPU
    with pytest.raises(ValueError, match="attention='sdpa_flash' is not in this PyTorch.*"
                                         "use attention=auto or attention=sdpa"):
        Attention("sdpa_flash").resolve(torch.device("cpu"), torch.bfloat16)


def test_unknown_kernel():
    with pytest.raises(ValueError, match="attention='xformers' is unknown; use one of auto"):
        Attention("xformers")
