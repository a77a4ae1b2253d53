"""TFACM's time LSTM: within half-overlapping segments of frames, begun from a cache memory (arXiv 2505.13094).

Shapes: L or N frames, S segments, K = 70 frames a segment (stride 35), R rows (batch and bins), C channels, H hidden;
sequences are ``(K, S, R, C)``: steps first, segments before rows, so that neither an LSTM nor a state ever needs a
transposition.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgesep.separators.streaming import Call, Carried

SEGMENT = 70  # frames, hard-coded by the authors
NORM_EPS = 1e-8

State = tuple[Tensor, Tensor]  # hidden and cell, (S, R, H) each


class LastNorm(nn.Module):
    """Layer norm over the last axis, parameters in the authors' shape."""

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(1, channels, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        gamma, beta = self.gamma[0, :, 0], self.beta[0, :, 0]
        return F.layer_norm(x, gamma.shape, gamma, beta, NORM_EPS)


class SegmentLstm(nn.Module):
    """LSTM within each segment, from a given state: ``(K, S, R, C)`` → the same, and the last states."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.lstm = nn.LSTM(channels, hidden)
        self.proj = nn.Linear(hidden, channels)
        self.norm = LastNorm(channels)

    def forward(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        segments, rows = x.shape[1:3]
        flat = x.flatten(1, 2)
        if state is None:
            zero = flat.new_zeros(1, flat.shape[1], self.lstm.hidden_size)
            start = (zero, zero)
        else:
            start = (state[0].flatten(0, 1)[None], state[1].flatten(0, 1)[None])
        y, (h, c) = self.lstm(flat, start)
        y = flat + self.norm(self.proj(y))
        return y.unflatten(1, (segments, rows)), (
            h[0].unflatten(0, (segments, rows)),
            c[0].unflatten(0, (segments, rows)),
        )

    def settled(self) -> State:
        """State ``(H,)`` after the half segment of zeros in front of an utterance."""
        with torch.no_grad():
            _, (h, c) = self.lstm(torch.zeros(SEGMENT // 2, self.lstm.input_size))
        return h[0], c[0]


class StreamingSegments(nn.Module):
    """``SegmentLstm`` over the frames of a call: ``(N, R, C)`` → both segments' sum, and the state of one that ended.

    Each frame lies in two segments, and at most one segment begins within a call, in place of one that ends there. One
    LSTM runs three sets of rows through all frames: the segment that ends, the one that lasts, and the new one, whose
    frames are moved to the front. Where a set has no frame, further inputs hold its cell: they open the forget gate
    and close the input gate. There are many of them, as large as what a norm makes, so that their weights are no larger
    than others: in INT8 all weights of a gate share one scale. Calls of 1, 5, 7 or 35 frames have no need of that,
    because segments begin with a call: the one that ends there has no frame left, and the new one takes its place in
    front of the LSTM.
    """

    HOLD = 32.0  # a sigmoid of little more than half of it is one in float32
    HOLDING = 16  # inputs that hold,
    HELD = 6.0  # and their value

    def __init__(self, segments: SegmentLstm):
        super().__init__()
        self.proj, self.norm = segments.proj, segments.norm
        self.settled = segments.settled()
        lstm = segments.lstm
        self.one = lstm
        self.rnn = nn.LSTM(lstm.input_size + self.HOLDING, lstm.hidden_size)
        state = lstm.state_dict()
        weight = self.HOLD / self.HELD / self.HOLDING
        gates = torch.tensor([-weight, weight, 0, 0]).repeat_interleave(lstm.hidden_size)  # input, forget, ...
        state["weight_ih_l0"] = torch.cat([state["weight_ih_l0"], gates[:, None].expand(-1, self.HOLDING)], 1)
        self.rnn.load_state_dict(state)

    def forward(self, x: Tensor, fresh: State | None, call: Call) -> tuple[Tensor, State]:
        frames, rows, _ = x.shape
        size = (2, rows, self.rnn.hidden_size)
        h, c = (call.carried.take(f"segments_{name}", size, v) for name, v in zip("hc", self.settled, strict=True))
        zero = h.new_zeros(size[1:])
        fresh_h, fresh_c = fresh or (zero, zero)
        b = call.boundary  # the frame that a segment begins with; N if none does
        if (SEGMENT // 2) % frames == 0:
            return self.step(x, (h, c), (fresh_h, fresh_c), call)

        n = torch.arange(frames)
        moved = x.index_select(0, (n + b).clamp(max=frames - 1))
        holds = torch.stack([n >= b, torch.zeros(frames, dtype=torch.bool), n + b >= frames], 1).to(x.dtype)
        seen = torch.cat([x, x, moved], 1)
        holding = (self.HELD * holds).repeat_interleave(rows, 1)[:, :, None].expand(-1, -1, self.HOLDING)
        seen = torch.cat([seen, holding], 2)
        y, (_, c_last) = self.rnn(
            seen, (torch.cat([h.flatten(0, 1), fresh_h])[None], torch.cat([c.flatten(0, 1), fresh_c])[None])
        )
        old, lasting, new = y.split(rows, 1)
        c_old, c_lasting, c_new = c_last[0].split(rows)
        h_old = torch.cat([h[:1], old]).index_select(0, b)[0]
        h_new = torch.cat([fresh_h[None], new]).index_select(0, frames - b)[0]
        h_lasting = lasting[-1]

        begins = b < frames
        call.carried.keep(
            "segments_h", torch.where(begins, torch.stack([h_lasting, h_new]), torch.stack([h_old, h_lasting]))
        )
        call.carried.keep(
            "segments_c", torch.where(begins, torch.stack([c_lasting, c_new]), torch.stack([c_old, c_lasting]))
        )
        other = torch.where((n < b)[:, None, None], old, new.index_select(0, (n - b).clamp(min=0)))
        summed = self.norm(self.proj(lasting)) + self.norm(self.proj(other))
        return 2 * x + summed, (h_old, c_old)

    def step(self, x: Tensor, state: State, fresh: State, call: Call) -> tuple[Tensor, State]:
        """The same for calls with which segments begin, if within one at all."""
        begins = call.boundary < 1
        # The segment that lasts is the second of both; where a new one begins it becomes the first.
        h, c = (torch.where(begins, torch.stack([s[1], f]), s) for s, f in zip(state, fresh, strict=True))
        y, (h_next, c_next) = self.one(x.repeat(1, 2, 1), (h.flatten(0, 1)[None], c.flatten(0, 1)[None]))
        h_next, c_next = h_next.view(h.shape), c_next.view(c.shape)
        call.carried.keep("segments_h", h_next)
        call.carried.keep("segments_c", c_next)
        summed = self.norm(self.proj(y.view(len(x), 2, *x.shape[1:2], -1))).sum(1)
        # Where one begins, the one in its place has just ended; elsewhere nobody reads this.
        return 2 * x + summed, (state[0][0], state[1][0])


class Recall(nn.Module):
    """LSTM and projection over the segments' states ``(S, R, H)``."""

    def __init__(self, hidden: int):
        super().__init__()
        self.rnn = nn.LSTM(hidden, hidden)
        self.proj = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.rnn(x)[0])

    def step(self, x: Tensor, ended: Tensor, carried: Carried) -> Tensor:
        """One segment's state ``(R, H)``; remembered only if it ``ended``."""
        h, c = (carried.take(name, (1, x.shape[0], self.rnn.hidden_size)) for name in "hc")
        y, (h_next, c_next) = self.rnn(x[None], (h, c))
        carried.keep("h", torch.where(ended, h_next, h))
        carried.keep("c", torch.where(ended, c_next, c))
        return self.proj(y[0])


class Memory(nn.Module):
    """The cache memory: what segments hand to those ``distance`` later in the next block."""

    def __init__(self, hidden: int, distance: int):
        super().__init__()
        self.distance = distance
        self.h_net, self.c_net = Recall(hidden), Recall(hidden)
        self.h_norm, self.c_norm = LastNorm(hidden), LastNorm(hidden)

    def forward(self, state: State) -> State:
        h = state[0] + self.h_norm(self.h_net(state[0]))
        c = state[1] + self.c_norm(self.c_net(state[1]))
        return self.later(h), self.later(c)

    def step(self, state: State, ended: Tensor, carried: Carried) -> State:
        """State ``(R, H)`` for the segment that begins where this one ``ended``, zeros where none did."""
        h = state[0] + self.h_norm(self.h_net.step(state[0], ended, carried.under("h_net")))
        c = state[1] + self.c_norm(self.c_net.step(state[1], ended, carried.under("c_net")))
        return h * ended, c * ended

    def later(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, self.distance, 0))[: x.shape[0]]


def segments_of(x: Tensor) -> Tensor:
    """``(L, R, C)`` → ``(K, S, R, C)``: half-overlapping segments, half a segment of zeros in front."""
    half, length = SEGMENT // 2, x.shape[0]
    pairs = (length + half) // SEGMENT + 1  # the authors' padding: an even number of segments
    x = F.pad(x, (0, 0, 0, 0, half, pairs * SEGMENT - length))
    halves = x.unflatten(0, (2 * pairs + 1, half)).transpose(0, 1)
    return torch.cat([halves[:, :-1], halves[:, 1:]])


def overlap_add(x: Tensor, length: int) -> Tensor:
    """``(K, S, R, C)`` → ``(length, R, C)``: sums overlapping segments and drops the padding."""
    half = SEGMENT // 2
    total = F.pad(x[:half], (0, 0, 0, 0, 0, 1)) + F.pad(x[half:], (0, 0, 0, 0, 1, 0))
    return total.transpose(0, 1).flatten(0, 1)[half : half + length]
