"""Mimi: waveforms ↔ codes.

Shape legend: N waveforms, K codebooks, T frames, S samples.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
from moshi.models import MimiModel

from finetune.data.types import SAMPLE_RATE_HZ

# Seconds of audio in one call. On GPUs it bounds the activations of Mimi's first layers (64 channels at 24 kHz:
# 6 MB a second); on CPUs a batch gains nothing, and large buffers are mapped anew for every layer, which doubled the
# time of the tiny codec.
MAX_SEC_PER_CALL = {"cuda": 200.0, "cpu": 10.0}


class Codec:
    """A frozen Mimi that encodes many waveforms at once.

    On a GPU it runs on a stream of its own, so that the thread that prepares batches works beside training.
    It stays in float32: codes are an argmin, and bfloat16 moves it (and some CPUs compute bfloat16
    convolutions wrong).
    """

    def __init__(self, mimi: MimiModel):
        self._mimi = mimi.float().eval().requires_grad_(False)
        self._device = next(mimi.parameters()).device
        torch.backends.cudnn.allow_tf32 = False  # on by default for convolutions, and the codec alone has any
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self.frame_size: int = mimi.frame_size
        self.num_codebooks: int = mimi.num_codebooks
        self.num_entries: int = mimi.cardinality

    @torch.no_grad()
    def encode(self, wavs: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Codes [K, T] of each waveform, on the CPU; a frame that is begun counts.

        Args:
            wavs: mono float32 at 24 kHz. Those of like length share a call, the shorter padded for it: the codec is
                causal, so that their own codes do not change.
        """
        codes: list[torch.Tensor] = [torch.empty(self.num_codebooks, 0, dtype=torch.int64)] * len(wavs)
        by_length = sorted((index for index, wav_S in enumerate(wavs) if len(wav_S)), key=lambda i: -len(wavs[i]))
        max_samples = MAX_SEC_PER_CALL[self._device.type] * SAMPLE_RATE_HZ
        while by_length:
            longest = len(wavs[by_length[0]])
            together = by_length[: max(1, int(max_samples / longest))]
            by_length = by_length[len(together) :]
            padded_NS = torch.zeros(len(together), longest)
            for row, index in enumerate(together):
                padded_NS[row, : len(wavs[index])] = torch.from_numpy(wavs[index])
            for index, codes_KT in zip(together, self._encode_some(padded_NS), strict=True):
                codes[index] = codes_KT[:, : -(-len(wavs[index]) // self.frame_size)]
        return codes

    def _encode_some(self, wavs_NS: torch.Tensor) -> torch.Tensor:
        on_device = torch.cuda.device(self._device) if self._stream else nullcontext()
        # Without `on_device` leaving the stream would select, and so open, GPU 0 in this thread.
        with on_device, torch.cuda.stream(self._stream):  # neither does anything on a CPU
            return self._mimi.encode(wavs_NS[:, None].to(self._device)).cpu()
