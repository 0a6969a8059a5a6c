"""AVFullDiT once more, from the equations: float64, one sample, loops over heads and queries.

Shares no code with `model/`: it takes the parameters by name, the settings as plain values, and
returns both velocities. Joint attention is one softmax over the union with an explicit table of who
sees whom, where the model slices keys; positions are angles from `math`, where it has tables.
"""

import math

import torch

from tests.support.models.oracle_math import (
    attention,
    expanded,
    frequencies,
    gelu,
    layer_norm,
    linear,
    mlp,
    rms_norm,
    rotate,
    silu,
    sinusoid,
)


class Oracle:
    """One model's parameters (name -> float64 tensor) and settings.

    settings: fusion, rope, layout, text, tau, head_dim, axes, video_heads, audio_heads, ffn sizes
    are read off the parameters; num_video, num_double, num_single, num_joint are block counts.
    """

    def __init__(self, parameters, **settings):
        self.p = parameters
        self.__dict__.update(settings)

    def heads(self, x):
        return x.unflatten(1, (-1, self.head_dim))

    def __call__(self, video, t, video_text, audio, audio_text, mask, duration, bias=0.0):
        self.grid = (video.shape[1], video.shape[2] // 2, video.shape[3] // 2)
        self.num_audio, self.num_text = len(audio), len(audio_text) + 1
        self.bias = bias
        v, video_state = self.video_embed(video, t, video_text)
        s, audio_state = self.audio_embed(audio, t, audio_text, mask, duration)
        for i in range(self.num_video):
            v = self.video_block(f"video.blocks.{i}.", v, video_state)
        for i in range(self.num_double):
            s = self.double_block(f"audio.transformer_blocks.{i}.", s, audio_state)
        for i in range(self.num_single):
            s = self.single_block(f"audio.single_transformer_blocks.{i}.", s, audio_state)
        for i in range(self.num_joint):
            v, s = self.joint_block(f"joint_blocks.{i}.", v, s, video_state, audio_state)
        return self.video_head(v, video_state), self.audio_head(s, audio_state)

    # Embeddings and heads

    def video_embed(self, video, t, text):
        p, name = self.p, "video.condition_embedder."
        weight = p["video.patch_embedding.weight"].flatten(1)
        frames, height, width = self.grid
        tokens = [
            weight @ video[:, f, 2 * y:2 * y + 2, 2 * x:2 * x + 2].flatten()
            + p["video.patch_embedding.bias"]
            for f in range(frames) for y in range(height) for x in range(width)
        ]
        time = linear(p, name + "time_embedder.linear_1", sinusoid(t))
        time = linear(p, name + "time_embedder.linear_2", silu(time))
        table = linear(p, name + "time_proj", silu(time)).unflatten(1, (6, -1))[0]
        text = mlp(p, name + "text_embedder", text, "linear_1", "linear_2")
        return torch.stack(tokens), (time, table, text)

    def video_head(self, v, state):
        shift, scale = self.p["video.modulation.scale_shift_table"][0] + state[0]
        y = linear(self.p, "video.proj_out", layer_norm(v, 1e-6) * (1 + scale) + shift)
        frames, height, width = self.grid
        channels = y.shape[1] // 4
        out = torch.zeros(channels, frames, 2 * height, 2 * width, dtype=torch.float64)
        for index, token in enumerate(y):
            f, rest = divmod(index, height * width)
            row, column = divmod(rest, width)
            patch = token.reshape(2, 2, channels).permute(2, 0, 1)
            out[:, f, 2 * row:2 * row + 2, 2 * column:2 * column + 2] = patch
        return out

    def audio_embed(self, audio, t, text, mask, duration):
        p = self.p
        pooled = torch.stack([row for row, keep in zip(text, mask, strict=True) if keep]).mean(0)
        pooled = torch.relu(linear(p, "audio.fc.0", pooled[None]))
        name = "audio.time_text_embed."
        time = silu(linear(p, name + "timestep_embedder.linear_1", sinusoid(t)))
        time = linear(p, name + "timestep_embedder.linear_2", time)
        words = silu(linear(p, name + "text_embedder.linear_1", pooled))
        embedding = time + linear(p, name + "text_embedder.linear_2", words)
        part = min(max(duration, 0.0), 30.0) / 30.0
        angles = 2 * math.pi * part * p["audio.duration_embedder.frequencies.weights"]
        features = torch.cat((torch.tensor([part]).double(), angles.sin(), angles.cos()))
        token = linear(p, "audio.duration_embedder.projection", features[None])
        text = linear(p, "audio.context_embedder", torch.cat((text, token)))
        return torch.cat((linear(p, "audio.x_embedder", audio), text)), silu(embedding)

    def audio_head(self, s, embedding):
        scale, shift = linear(self.p, "audio.norm_out.linear", embedding)[0].chunk(2)
        audio = s[:self.num_audio]
        return linear(self.p, "audio.proj_out", layer_norm(audio, 1e-6) * (1 + scale) + shift)

    # Positions, in radians

    def video_angles(self):
        spatial = 2 * (self.head_dim // 6)
        scale = self.tau if self.rope == "expand_video" else 1.0
        frames, height, width = self.grid
        return [
            [[f * scale * w for w in frequencies(self.head_dim - 2 * spatial)]
             + [y * w for w in frequencies(spatial)] + [x * w for w in frequencies(spatial)]]
            for f in range(frames) for y in range(height) for x in range(width)
        ]

    def times(self):
        """Time index of every video token and of every token of [audio | text]."""
        frames, height, width = self.grid
        scale = self.tau if self.rope == "expand_video" else 1.0
        divisor = self.tau if self.rope == "shrink_audio" else 1.0
        video = [f * scale for f in range(frames) for _ in range(height * width)]
        return video, [a / divisor for a in range(self.num_audio)] + [0.0] * self.num_text

    def native(self, time):
        return [time * w for dim in self.axes for w in frequencies(dim)]

    def wan(self, time):
        dim = self.head_dim - 4 * (self.head_dim // 6)
        angles = [time * w for w in frequencies(dim)]
        return angles + [0.0] * (self.head_dim // 2 - len(angles))

    def stream_angles(self, joint):
        """One list per head where heads differ."""
        layout = self.layout if joint and self.fusion == "full" else "native"
        old, new = self.audio_heads, self.video_heads - self.audio_heads
        tables = {
            "native": lambda time: [self.native(time)],
            "wan": lambda time: [self.wan(time)],
            "hybrid": lambda time: [self.native(time)] * old + [self.wan(time)] * new,
        }
        return [tables[layout](time) for time in self.times()[1]]

    # Blocks, each split where the attention is

    def video_qkv(self, name, x, source):
        p = self.p
        q = rms_norm(linear(p, name + "to_q", x), p[name + "norm_q.weight"])
        k = rms_norm(linear(p, name + "to_k", source), p[name + "norm_k.weight"])
        return self.heads(q), self.heads(k), self.heads(linear(p, name + "to_v", source))

    def video_before(self, name, v, state):
        table = self.p[name + "modulation.scale_shift_table"][0] + state[1]
        n = layer_norm(v, 1e-6) * (1 + table[1]) + table[0]
        q, k, value = self.video_qkv(name + "attn1.", n, n)
        angles = self.video_angles()
        return (rotate(q, angles), rotate(k, angles), value), table

    def video_attended(self, name, v, attended, table):
        return v + table[2] * linear(self.p, name + "attn1.to_out.0", attended)

    def video_after(self, name, v, state, table):
        p = self.p
        n = layer_norm(v, 1e-6) * p[name + "norm2.weight"] + p[name + "norm2.bias"]
        attended = attention(*self.video_qkv(name + "attn2.", n, state[2]))
        v = v + linear(p, name + "attn2.to_out.0", attended)
        n = layer_norm(v, 1e-6) * (1 + table[4]) + table[3]
        return v + table[5] * mlp(p, name + "ffn", n)

    def video_block(self, name, v, state):
        qkv, table = self.video_before(name, v, state)
        v = self.video_attended(name, v, attention(*qkv), table)
        return self.video_after(name, v, state, table)

    def audio_qkv(self, name, x, projections, norms):
        q, k, v = (self.heads(expanded(self.p, name + part, x)) for part in projections)
        norm_q, norm_k = (self.p[name + norm + ".weight"] for norm in norms)
        return rms_norm(q, norm_q), rms_norm(k, norm_k), v

    def double_before(self, name, s, embedding, joint):
        a = linear(self.p, name + "norm1.linear", embedding)[0].chunk(6)
        c = linear(self.p, name + "norm1_context.linear", embedding)[0].chunk(6)
        audio = layer_norm(s[:self.num_audio], 1e-6) * (1 + a[1]) + a[0]
        text = layer_norm(s[self.num_audio:], 1e-6) * (1 + c[1]) + c[0]
        own = self.audio_qkv(name + "attn.", audio, ("to_q", "to_k", "to_v"),
                             ("norm_q", "norm_k"))
        added = self.audio_qkv(name + "attn.", text, ("add_q_proj", "add_k_proj", "add_v_proj"),
                               ("norm_added_q", "norm_added_k"))
        q, k, v = (torch.cat(pair) for pair in zip(own, added, strict=True))
        angles = self.stream_angles(joint)
        return (rotate(q, angles), rotate(k, angles), v), (a, c)

    def double_attended(self, name, s, attended, state):
        (a, c), n = state, self.num_audio
        audio = s[:n] + a[2] * self.output(name + "attn.to_out.0", attended[:n])
        return torch.cat((audio, s[n:] + c[2] * self.output(name + "attn.to_add_out",
                                                            attended[n:])))

    def double_after(self, name, s, state):
        parts = []
        for x, (*_, shift, scale, gate), ff in zip(
            (s[:self.num_audio], s[self.num_audio:]), state, ("ff", "ff_context"), strict=True
        ):
            parts.append(x + gate * mlp(self.p, name + ff, layer_norm(x, 1e-6) * (1 + scale)
                                        + shift))
        return torch.cat(parts)

    def output(self, name, attended):
        weight = self.p[name + ".weight"]
        if name + ".new_weight" in self.p:
            weight = torch.cat((weight, self.p[name + ".new_weight"]), dim=1)
        return attended @ weight.T + self.p[name + ".bias"]

    def single_before(self, name, s, embedding, joint):
        shift, scale, gate = linear(self.p, name + "norm.linear", embedding)[0].chunk(3)
        n = layer_norm(s, 1e-6) * (1 + scale) + shift
        q, k, v = self.audio_qkv(name + "attn.", n, ("to_q", "to_k", "to_v"),
                                 ("norm_q", "norm_k"))
        angles = self.stream_angles(joint)
        hidden = gelu(linear(self.p, name + "proj_mlp", n))
        return (rotate(q, angles), rotate(k, angles), v), (hidden, gate)

    def single_attended(self, name, s, attended, state):
        """proj_out over [attention | MLP], the new rows of Eq. 9 between the two."""
        hidden, gate = state
        weight, dim = self.p[name + "proj_out.weight"], s.shape[1]
        if name + "proj_out.new_weight" in self.p:
            new = self.p[name + "proj_out.new_weight"]
            weight = torch.cat((weight[:, :dim], new, weight[:, dim:]), dim=1)
        out = torch.cat((attended, hidden), dim=1) @ weight.T + self.p[name + "proj_out.bias"]
        return s + gate * out

    def double_block(self, name, s, embedding):
        qkv, state = self.double_before(name, s, embedding, joint=False)
        return self.double_after(name, self.double_attended(name, s, attention(*qkv), state), state)

    def single_block(self, name, s, embedding):
        qkv, state = self.single_before(name, s, embedding, joint=False)
        return self.single_attended(name, s, attention(*qkv), state)

    def joint_block(self, name, v, s, video_state, embedding):
        video, audio = name + "video.", name + "audio."
        double = audio + "norm1.linear.weight" in self.p
        before = self.double_before if double else self.single_before
        attended = self.double_attended if double else self.single_attended
        video_qkv, table = self.video_before(video, v, video_state)
        audio_qkv, state = before(audio, s, embedding, joint=True)
        if self.fusion == "full":
            both = (torch.cat(pair) for pair in zip(video_qkv, audio_qkv, strict=True))
            union = attention(*both, *self.relations(len(v)))  # Eq. 7
            video_out, audio_out = union[:len(v)], union[len(v):]
        else:
            video_out, audio_out = attention(*video_qkv), attention(*audio_qkv)
        v = self.video_attended(video, v, video_out, table)
        s = attended(audio, s, audio_out, state)
        if self.fusion == "cross":
            v, s = self.fuse(name, v, s)
        v = self.video_after(video, v, video_state, table)
        return v, self.double_after(audio, s, state) if double else s

    def relations(self, num_video):
        """Who sees whom, and the bias between modalities, over [video | audio | text]."""
        kinds = "V" * num_video + "A" * self.num_audio + "T" * self.num_text
        blind = {("V", "T"), ("T", "V")} if self.text == "masked" else set()
        sees = [[(a, b) not in blind for b in kinds] for a in kinds]
        bias = [[self.bias if (a == "V") != (b == "V") else 0.0 for b in kinds] for a in kinds]
        return torch.tensor(sees), torch.tensor(bias, dtype=torch.float64)

    def fuse(self, name, v, s):
        """Table 3a: each modality attends to the other as it was before."""
        heard = self.num_audio + (self.num_text if self.text == "stream" else 0)
        video_times, stream_times = self.times()
        angle = self.native if self.layout == "native" else self.wan
        v_angles = [[angle(time)] for time in video_times]
        s_angles = [[angle(time)] for time in stream_times[:heard]]
        to_video = self.fusion_step(name + "new_video_fusion.", v, s[:heard], v_angles, s_angles)
        to_audio = self.fusion_step(name + "new_audio_fusion.", s[:heard], v, s_angles, v_angles)
        return v + to_video, torch.cat((s[:heard] + to_audio, s[heard:]))

    def fusion_step(self, name, x, other, angles, other_angles):
        p, own, source = self.p, layer_norm(x, 1e-6), layer_norm(other, 1e-6)
        q = rms_norm(self.heads(linear(p, name + "to_q", own)), p[name + "norm_q.weight"])
        k = rms_norm(self.heads(linear(p, name + "to_k", source)), p[name + "norm_k.weight"])
        v = self.heads(linear(p, name + "to_v", source))
        out = attention(rotate(q, angles), rotate(k, other_angles), v)
        return linear(p, name + "to_out", out)
