"""CSM one position at a time: keys and values of both transformers are kept instead of computed anew.

The model's own layers compute, so adapters on them count. What is kept hangs on the one thing that a layer takes from
outside, its attention (`Attend` in segments.py).

Shape legend: B batch, K codebooks, T positions, S slots of a cache, D width, H heads, G query heads that share a head
of keys, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from finetune.data.types import ABSENT, send
from finetune.families.csm.model import CsmModel, rotary_tables
from finetune.segments import Attend, attend_causally


class Cache:
    """Keys and values [B, H, S, D/H] of each layer of one transformer; slot and position are the same."""

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._layers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def attend_start(self) -> Attend:
        """Attention over the first positions, for one run through the layers; what was kept before is forgotten."""
        self._layers = []

        def attend(q_BHTD: torch.Tensor, k_BHTD: torch.Tensor, v_BHTD: torch.Tensor) -> torch.Tensor:
            # Zeros, since a slot that is masked must still hold a number: 0 · NaN is not 0.
            unused = (0, 0, 0, self._capacity - k_BHTD.shape[2])
            self._layers.append((F.pad(k_BHTD, unused), F.pad(v_BHTD, unused)))
            return attend_causally(q_BHTD, k_BHTD, v_BHTD)

        return attend

    def attend_next(self, slot: int) -> Attend:
        """Attention of one more position, the same in every row, for one run through the layers."""
        layers = iter(self._layers)

        def attend(q_BH1D: torch.Tensor, k_BH1D: torch.Tensor, v_BH1D: torch.Tensor) -> torch.Tensor:
            k_BHSD, v_BHSD = next(layers)
            k_BHSD[:, :, slot] = k_BH1D[:, :, 0]
            v_BHSD[:, :, slot] = v_BH1D[:, :, 0]
            return _attend_grouped(q_BH1D, k_BHSD[:, :, : slot + 1], v_BHSD[:, :, : slot + 1], None)

        return attend

    def attend_next_of_rows(self, slot_B: torch.Tensor, num_slots: int) -> Attend:
        """The same where each row has its own next position, below `num_slots`."""
        layers = iter(self._layers)
        rows_B = torch.arange(len(slot_B), device=slot_B.device)
        is_seen_B11S = (torch.arange(num_slots, device=slot_B.device) <= slot_B[:, None])[:, None, None]

        def attend(q_BH1D: torch.Tensor, k_BH1D: torch.Tensor, v_BH1D: torch.Tensor) -> torch.Tensor:
            k_BHSD, v_BHSD = next(layers)
            k_BHSD[rows_B, :, slot_B] = k_BH1D[:, :, 0]
            v_BHSD[rows_B, :, slot_B] = v_BH1D[:, :, 0]
            return _attend_grouped(q_BH1D, k_BHSD[:, :, :num_slots], v_BHSD[:, :, :num_slots], is_seen_B11S)

        return attend


def _attend_grouped(
    q_BH1D: torch.Tensor, k_BHSD: torch.Tensor, v_BHSD: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """One query position over all slots.

    Query heads that share a head of keys stand side by side as its queries: so the keys are read once, and every
    kernel can do it, also those that know no grouped heads.
    """
    q_BHGD = q_BH1D.squeeze(2).unflatten(1, (k_BHSD.shape[1], -1))
    return F.scaled_dot_product_attention(q_BHGD, k_BHSD, v_BHSD, attn_mask=mask).flatten(1, 2)[:, :, None]


class BackboneStream:
    """The backbone over a batch of prompts of any lengths, then over one frame after the other.

    Prompts are padded on the right and every row goes on where its own prompt ends, over its padding. So positions
    are those that the row has alone, and padding needs no mask in the first pass.
    """

    def __init__(self, model: CsmModel, prompts: Sequence[torch.Tensor], num_positions: int):
        """
        Args:
            prompts: codes [1 + K, T] on the CPU.
            num_positions: the most positions that a row will have, prompt included.
        """
        self._model = model
        self._device = model.lm_head.weight.device
        self._codes_BKT = torch.nn.utils.rnn.pad_sequence(
            [codes_KT.T for codes_KT in prompts], batch_first=True, padding_value=ABSENT
        ).transpose(1, 2)
        self._capacity = max(num_positions, self._codes_BKT.shape[-1])
        self._cache = Cache(self._capacity)
        lengths = [codes_KT.shape[1] for codes_KT in prompts]
        self._are_alike = len(set(lengths)) == 1
        self._longest = max(lengths)
        self._next_B = send(torch.tensor(lengths), self._device)

    def start(self) -> torch.Tensor:
        """Read the prompts; the output [B, D] at the last position of each."""
        position_BT = torch.arange(self._longest, device=self._device).expand(len(self._codes_BKT), -1)
        codes_BKT = send(self._codes_BKT, self._device)
        hidden_BTD = self._model.hidden_states(codes_BKT, position_BT, self._cache.attend_start())
        return hidden_BTD[torch.arange(len(hidden_BTD), device=self._device), self._next_B - 1]

    def step(self, frame_BK: torch.Tensor) -> torch.Tensor:
        """Read one audio frame more; the output [B, D] there.

        Rows that are full stay at the last position, where what they give has no meaning.
        """
        codes_BK1 = F.pad(frame_BK, (1, 0), value=ABSENT)[..., None]
        position_B = self._next_B.clamp(max=self._capacity - 1)
        if self._are_alike:
            attend = self._cache.attend_next(self._longest)
        else:
            attend = self._cache.attend_next_of_rows(position_B, min(self._longest + 1, self._capacity))
        hidden_B1D = self._model.hidden_states(codes_BK1, position_B[:, None], attend)
        self._next_B = self._next_B + 1
        self._longest += 1
        return hidden_B1D[:, 0]


class DepthStream:
    """The decoder over the codebooks of one frame after the other."""

    def __init__(self, model: CsmModel):
        self._model = model
        self._decoder = model.depth_decoder.model
        self._num_codebooks = model.config.num_codebooks
        self._cache = Cache(self._num_codebooks)
        positions_1K = torch.arange(self._num_codebooks, device=model.lm_head.weight.device)[None]
        self._cos, self._sin = rotary_tables(model.config.decoder, positions_1K)
        self._codebook = 0

    def start(self, hidden_BD: torch.Tensor, code_B: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] of codebook 1, given the backbone's output and codebook 0 of a new frame."""
        self._codebook = 0
        embedded_BD = self._model.audio_embedding(code_B).to(hidden_BD.dtype)
        return self._run(torch.stack([hidden_BD, embedded_BD], 1), 0, self._cache.attend_start())

    def step(self, code_B: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] of the next codebook, given the one that the last logits were of."""
        self._codebook += 1
        offset = self._codebook * self._model.config.audio_vocab_size
        embedded_B1D = self._model.audio_embedding(code_B[:, None] + offset).to(self._model.lm_head.weight.dtype)
        slot = self._codebook + 1  # the backbone's output comes first
        return self._run(embedded_B1D, slot, self._cache.attend_next(slot))

    def _run(self, x_BTD: torch.Tensor, start: int, attend: Attend) -> torch.Tensor:
        stop = start + x_BTD.shape[1]
        # `Transformer.run` would make the tables anew for every codebook.
        tables = (self._cos[:, :, start:stop], self._sin[:, :, start:stop])
        x_BTD = self._decoder.inputs_embeds_projector(x_BTD)
        for layer in self._decoder.layers:
            x_BTD = layer(x_BTD, tables, attend)
        return self._decoder.norm(x_BTD[:, -1]) @ self._model.depth_decoder.codebooks_head.weight[self._codebook]
