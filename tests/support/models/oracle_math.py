"""The arithmetic of the oracle: float64, one sample, loops over heads and queries.

Written from the equations; shares no code with `model/`. See tests/support/models/oracle.py.
"""

import math

import torch


def linear(p, name, x):
    return x @ p[name + ".weight"].T + p[name + ".bias"]


def expanded(p, name, x):
    """h [W_a ; W_an], Eq. 6; without new columns an ordinary projection."""
    own = linear(p, name, x)
    if name + ".new_weight" not in p:
        return own
    return torch.cat((own, x @ p[name + ".new_weight"].T + p[name + ".new_bias"]), dim=1)


def layer_norm(x, eps):
    centred = x - x.mean(dim=1, keepdim=True)
    return centred / (centred.square().mean(dim=1, keepdim=True) + eps).sqrt()


def rms_norm(x, weight, eps=1e-6):
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x / (1 + torch.exp(-x))


def mlp(p, name, x, first="net.0.proj", second="net.2"):
    return linear(p, f"{name}.{second}", gelu(linear(p, f"{name}.{first}", x)))


def sinusoid(t):
    angles = [1000 * t * 10000 ** (-i / 128) for i in range(128)]
    return torch.tensor([[*map(math.cos, angles), *map(math.sin, angles)]], dtype=torch.float64)


def frequencies(dim):
    return [10000 ** (-2 * j / dim) for j in range(dim // 2)]


def rotate(x, angles):
    """x (L, H, D), angles[l][h] a list of D/2 radians: pairs (2i, 2i+1) turn by them."""
    turn = torch.tensor(angles, dtype=torch.float64)  # (L, H, D/2)
    even, odd = x[..., 0::2], x[..., 1::2]
    pairs = (even * turn.cos() - odd * turn.sin(), even * turn.sin() + odd * turn.cos())
    return torch.stack(pairs, dim=-1).flatten(2)


def attention(q, k, v, sees=None, bias=None):
    """q (Lq, H, D) against k, v (Lk, H, D); query i sees key j where sees[i][j]."""
    rows = []
    for i in range(q.shape[0]):
        heads = []
        for h in range(q.shape[1]):
            logits = k[:, h] @ q[i, h] / math.sqrt(q.shape[2])
            if bias is not None:
                logits = logits + bias[i]
            if sees is not None:
                logits = torch.where(sees[i], logits, -torch.inf)
            heads.append(torch.softmax(logits, dim=0) @ v[:, h])
        rows.append(torch.cat(heads))
    return torch.stack(rows)  # (Lq, H * D)
