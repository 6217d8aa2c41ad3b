"""Moshi over packed rows equals Moshi over each sample alone, with real speech of different lengths."""

import json
from dataclasses import replace

import pytest
import sphn
import torch
from torch import nn

from conftest import CPU, QUICKSTART, make_moshi
from finetune.data.types import ABSENT, SAMPLE_RATE_HZ, Batch, Clip, Sample, Word, collate, trim
from finetune.errors import UserError
from finetune.families.moshi import MoshiFamily
from finetune.parallel import prepare_blocks
from finetune.segments import positions, segment_attention
from test_moshi_parity import VARIANTS, load_pair

WINDOW_SEC = 4.0
SPEECH = QUICKSTART / "dialogues" / "audio" / "dialogue_001"
# Where each sample starts and how long its file is: files shorter than the window, one of a single frame, one that
# ends inside the window by less than a delay, and whole windows.
CLIPS = [(0.0, 1.3), (3.0, 0.05), (7.1, 2.7), (12.0, 4.0), (20.0, 3.9), (0.0, 4.0), (25.0, 0.4)]
# Several in a row, short ones before long ones and behind them; a full row of one; short ones alone.
ROWS = [[2, 1, 0, 3], [5], [0], [1], [4, 6, 2], [3, 5]]
DELAYS = {
    "as_published": {},
    "none": {"delays": [0] * 17},
    "semantic_and_acoustic": VARIANTS["hibiki"],
    "text_last": VARIANTS["text_only"],
    "text_and_voices": {"delays": [1, 0] + [2] * 7 + [2] + [1] * 7},
    "sine_positions": {"positional_embedding": "sin"},
    "sine_and_rotary_positions": VARIANTS["plain_feed_forward"],
    "rotary_halves": VARIANTS["rope_halves"],
    "short_context": VARIANTS["short_context"],
    "grouped_keys": VARIANTS["grouped_keys"],
}


def read_clip(start_sec: float, length_sec: float) -> Clip:
    """Some speech as if it were the end of a file."""
    wav_CS, rate_hz = sphn.read(f"{SPEECH}.flac", start_sec=start_sec, duration_sec=length_sec)
    wav_CS = sphn.resample(wav_CS, rate_hz, SAMPLE_RATE_HZ)
    alignments = json.loads(SPEECH.with_suffix(".json").read_text())["alignments"]
    words = [
        Word(text, start - start_sec, end - start_sec, speaker)
        for text, (start, end), speaker in alignments
        if start_sec <= start < start_sec + length_sec
    ]
    return Clip(wav_CS, words, f"{SPEECH}.flac", start_sec, WINDOW_SEC)


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return [read_clip(*clip) for clip in CLIPS]


def make_model(folder, **architecture) -> tuple[MoshiFamily, nn.Module]:
    """Scaled up, so that what a frame is fed and what it looks at tells in its losses."""
    family, model, _ = load_pair(make_moshi(folder, **architecture))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "emb" in name or "in_proj" in name:
                parameter.mul_(3.0)
    return family, model


def pack(family: MoshiFamily, samples: list[Sample]) -> Batch:
    trimmed = [trim(sample, family.num_tail_frames) for sample in samples]
    return collate([[trimmed[index] for index in row] for row in ROWS], num_frames=128)


def weighted(nll_BKT: torch.Tensor, batch: Batch) -> torch.Tensor:
    return (nll_BKT * batch.loss_weight_BKT).sum()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Taken off the model."""
    taken = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return taken


@pytest.mark.parametrize("variant", DELAYS)
def test_packed_rows_equal_each_sample_alone(variant, clips, tmp_path):
    """Losses of every frame and code, and the sum of the gradients; alone, samples are as long as the window."""
    family, model = make_model(tmp_path / "model", **DELAYS[variant])
    samples = family.tokenize(clips, [None] * len(clips))
    batch = pack(family, samples)
    num_targets = int((batch.loss_weight_BKT > 0).sum())
    nll_BKT = family.nll(model, batch)
    (weighted(nll_BKT, batch) / num_targets).backward()
    packed = gradients(model)
    seen = 0
    for nll_KT, row in zip(nll_BKT.detach(), ROWS, strict=True):
        start = 0
        for index in row:
            alone = collate([[samples[index]]])
            expected_1KT = family.nll(model, alone)
            (weighted(expected_1KT, alone) / num_targets).backward()
            length = trim(samples[index], family.num_tail_frames).codes_KT.shape[1]
            got_KT = nll_KT[:, start : start + length]
            torch.testing.assert_close(got_KT, expected_1KT[0, :, :length].detach(), rtol=1e-5, atol=1e-5)
            assert (expected_1KT[0, :, length:] == 0).all()
            seen += int((got_KT > 0).sum())
            start += length
        assert (nll_KT[:, start:] == 0).all()
    assert seen == num_targets > 100
    one_by_one = gradients(model)
    assert packed.keys() == one_by_one.keys()
    for name, gradient in packed.items():
        torch.testing.assert_close(gradient, one_by_one[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("variant", ["as_published", "semantic_and_acoustic", "text_last"])
def test_nothing_is_predicted_across_the_end_of_a_segment(variant, tmp_path):
    """The model itself gives 0 where a delay leads out of a segment, as it does at the end of a row."""
    family, model = make_model(tmp_path / "model", **DELAYS[variant])
    kwargs = family._lm_kwargs
    lengths = [1, 9, 2, 20]
    segment_1T = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    codes_1KT = torch.randint(0, kwargs["card"], (1, 1 + kwargs["n_q"], sum(lengths)))
    rows = torch.arange(sum(lengths))
    nll_1KT = model(codes_1KT, rows, rows, position_BT=positions(segment_1T), attend=segment_attention(segment_1T, CPU))
    alone = [model(codes, rows[:n], rows[:n]) for codes, n in zip(codes_1KT.split(lengths, -1), lengths, strict=True)]
    torch.testing.assert_close(nll_1KT, torch.cat(alone, -1), rtol=1e-5, atol=1e-5)
    assert (nll_1KT[:, kwargs["delays"].index(max(kwargs["delays"][: 1 + kwargs["dep_q"]])), 0] == 0).all()


def test_recomputation_changes_nothing(clips, tmp_path):
    family, model = make_model(tmp_path / "model")
    batch = pack(family, family.tokenize(clips, [None] * len(clips)))
    weighted(family.nll(model, batch), batch).backward()
    expected = gradients(model)
    prepare_blocks(family.blocks(model), compile=False, recompute=True)
    weighted(family.nll(model, batch), batch).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-4, msg=name)


def test_delays_need_the_empty_frames_behind_a_sample(family, clips):
    """The tail that the family asks for is the shortest that keeps every target."""
    assert family.num_tail_frames == max(family._delays) == 1
    sample = family.tokenize(clips[:1], [None])[0]
    present = int((sample.codes_KT != ABSENT).any(0).sum())
    assert trim(sample, family.num_tail_frames).codes_KT.shape[1] == present + 1
    assert (sample.loss_weight_KT[1:9, present - 1] > 0).all()  # predicted at the first empty frame


def test_a_packed_row_of_nothing_has_no_loss(family, clips, tiny_moshi):
    _, model, _ = load_pair(tiny_moshi)
    batch = pack(family, family.tokenize(clips, [None] * len(clips)))
    empty = torch.full_like(batch.codes_BKT, ABSENT)
    batch = replace(batch, codes_BKT=empty, loss_weight_BKT=torch.zeros_like(batch.loss_weight_BKT))
    nll_BKT = family.nll(model, batch)
    assert (nll_BKT == 0).all()
    nll_BKT.sum().backward()


def test_conditions_cannot_be_packed(clips, tmp_path):
    family, model = make_model(tmp_path / "model", **VARIANTS["conditioned"])
    assert not family.can_pack
    samples = family.tokenize(clips, [None] * len(clips))
    with pytest.raises(UserError, match=r"data\.packing: pack .*bucket"):
        family.nll(model, pack(family, samples))
    assert (family.nll(model, collate([[sample] for sample in samples])) > 0).any()


def test_moshi_without_conditions_can_be_packed(family):
    assert family.can_pack


@pytest.mark.gpu
def test_a_gpu_gives_the_cpus_losses(clips, tmp_path):
    family, model = make_model(tmp_path / "model")
    batch = pack(family, family.tokenize(clips, [None] * len(clips)))
    expected = family.nll(model, batch)
    weighted(expected, batch).backward()
    on_cpu = gradients(model)
    model.to("cuda")
    nll_BKT = family.nll(model, batch)
    (nll_BKT * batch.loss_weight_BKT.cuda()).sum().backward()
    torch.testing.assert_close(nll_BKT.cpu(), expected, rtol=1e-3, atol=1e-3)
    norm = torch.stack([gradient.norm() for gradient in on_cpu.values()]).norm()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient.cpu() / norm, on_cpu[name] / norm, rtol=1e-2, atol=1e-3, msg=name)
