"""Mimi: waveforms ↔ codes.

Shape legend: N waveforms, K codebooks, T frames, S samples.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
from moshi.models import MimiModel

from finetune.data.types import ABSENT, SAMPLE_RATE_HZ

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
    def encode(self, wavs: Sequence[np.ndarray], num_samples: int) -> torch.Tensor:
        """Codes [N, K, T] on the CPU, ABSENT past the end of each waveform.

        Args:
            wavs: mono float32 at 24 kHz, each at most `num_samples` long; shorter ones are padded for the
                codec, which is causal, so that their own codes do not change.
        """
        padded_NS = torch.zeros(len(wavs), num_samples)
        for row, wav_S in enumerate(wavs):
            padded_NS[row, : len(wav_S)] = torch.from_numpy(wav_S)
        per_call = max(1, int(MAX_SEC_PER_CALL[self._device.type] * SAMPLE_RATE_HZ / num_samples))
        codes_NKT = torch.cat([self._encode_some(part) for part in padded_NS.split(per_call)])
        num_frames_N = torch.tensor([-(-len(wav_S) // self.frame_size) for wav_S in wavs])
        past_end_NT = torch.arange(codes_NKT.shape[-1]) >= num_frames_N[:, None]
        return codes_NKT.masked_fill(past_end_NT[:, None], ABSENT)

    def _encode_some(self, wavs_NS: torch.Tensor) -> torch.Tensor:
        on_device = torch.cuda.device(self._device) if self._stream else nullcontext()
        # Without `on_device` leaving the stream would select, and so open, GPU 0 in this thread.
        with on_device, torch.cuda.stream(self._stream):  # neither does anything on a CPU
            return self._mimi.encode(wavs_NS[:, None].to(self._device)).cpu()
