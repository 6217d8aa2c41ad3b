"""Attention inside segments against attention over each segment alone."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from conftest import CPU
from finetune.segments import dense_segments, extend_last, flex_segments, is_packed, positions, segment_attention

# Segments of one position, of many, in one row alone, and padding.
SEGMENT_BT = torch.tensor([[0] * 5 + [1] + [2] * 8 + [-1] * 6, [0] * 20, [0] * 19 + [1], [0] * 3 + [-1] * 17])


def random_heads(num_positions: int, *, kv_heads: int = 2, head_dim: int = 8, batch_size: int = 4, **kinds):
    """Queries of four heads, keys and values."""
    shapes = [(batch_size, heads, num_positions, head_dim) for heads in (4, kv_heads, kv_heads)]
    return [torch.randn(shape, **kinds, requires_grad=True) for shape in shapes]


def attend_one_by_one(segment_BT: torch.Tensor, context: int | None, q, k, v) -> torch.Tensor:
    """Each query by itself, over the keys before it that are in its segment and its context."""
    out = torch.empty_like(q)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    for row, segments in enumerate(segment_BT.tolist()):
        for here, segment in enumerate(segments):
            seen = [at for at in range(here + 1) if segments[at] == segment and at > here - (context or here + 1)]
            scores = torch.einsum("hd,htd->ht", q[row, :, here], k[row][:, seen]) / q.shape[-1] ** 0.5
            out[row, :, here] = torch.einsum("ht,htd->hd", scores.softmax(-1), v[row][:, seen])
    return out


def outputs_and_gradients(attend, *heads: torch.Tensor) -> list[torch.Tensor]:
    out = attend(*heads)
    weight = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), heads)]


def test_positions_restart_at_every_segment():
    segment_BT = torch.tensor(
        [[0, 0, 0, 1, 2, 2, -1, -1], [0, 0, 0, 0, 0, 0, 0, 0], [-1] * 8, [0, 1, 2, 3, 4, 4, 4, -1]]
    )
    restarted = [[0, 1, 2, 0, 0, 1, 0, 1], [*range(8)], [*range(8)], [0, 0, 0, 0, 0, 1, 2, 0]]
    assert positions(segment_BT).tolist() == restarted
    assert positions(segment_BT).dtype == torch.int64


def test_padding_joins_the_last_segment_of_its_row():
    joined = [[0] * 5 + [1] + [2] * 14, [0] * 20, [0] * 19 + [1], [0] * 20]
    assert extend_last(SEGMENT_BT).tolist() == joined
    assert is_packed(extend_last(SEGMENT_BT))
    assert not is_packed(extend_last(SEGMENT_BT[[1, 3]]))
    assert not is_packed(extend_last(torch.full((2, 5), -1)))


@pytest.mark.parametrize(
    ("segments", "context", "is_plain"),
    [
        ([[0] * 6, [0] * 4 + [-1] * 2, [-1] * 6], None, True),
        ([[0] * 6], 6, True),
        ([[0] * 6], 5, False),
        ([[0] * 6, [0] * 5 + [1]], None, False),
        ([[-1] + [0] * 5], None, False),
        ([[0, 0, -1, 0, 0, 0]], None, False),
    ],
)
def test_rows_of_one_segment_need_no_mask(segments, context, is_plain):
    assert (segment_attention(torch.tensor(segments), CPU, context) is None) == is_plain


@pytest.mark.parametrize("context", [None, 4, 1, 20])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_dense_attention_stays_inside_segments(context, kv_heads):
    heads = random_heads(20, kv_heads=kv_heads)
    attend = segment_attention(SEGMENT_BT, CPU, context)
    got = outputs_and_gradients(attend, *heads)
    expected = outputs_and_gradients(lambda *heads: attend_one_by_one(SEGMENT_BT, context, *heads), *heads)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_segment_equals_plain_causal_attention_over_it_alone():
    q, k, v = random_heads(20)
    out = segment_attention(SEGMENT_BT, CPU)(q, k, v)
    alone = (x[:1, :, 6:14] for x in (q, k, v))
    expected = F.scaled_dot_product_attention(*alone, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out[:1, :, 6:14], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_finite_in_the_padding(dtype):
    got = outputs_and_gradients(segment_attention(SEGMENT_BT, CPU), *random_heads(20, dtype=dtype))
    assert all(tensor.dtype == dtype and tensor.isfinite().all() for tensor in got)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize(("kv_heads", "head_dim", "context"), [(4, 16, None), (2, 8, None), (1, 16, 7), (2, 24, 150)])
def test_flex_attention_equals_dense(kv_heads, head_dim, context):
    """Over several blocks of 128, empty, partial and full ones."""
    lengths = [[40, 270, 1, 9], [320], [1] * 20 + [300]]
    segment_BT = torch.tensor([[i for i, n in enumerate(row) for _ in range(n)] for row in lengths])
    segment_BT = torch.cat([segment_BT, torch.full((3, 13), -1)], 1)
    heads = random_heads(333, kv_heads=kv_heads, head_dim=head_dim, batch_size=3)
    with torch.no_grad():
        flex, dense = flex_segments(segment_BT, context)(*heads), dense_segments(segment_BT, context)(*heads)
    torch.testing.assert_close(flex, dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [dense_segments, flex_segments])
def test_compiled_blocks_take_every_batch(make):
    """One graph without breaks; another one for other lengths, and none for other segments."""
    counter = CompileCounter()

    def block(x, attend):
        return x + attend(x.sin(), x[:, :2], x[:, :2].cos())

    compiled = torch.compile(block, backend=counter, fullgraph=True)
    with torch.no_grad():
        for num_frames in (256, 256, 384, 512, 640):
            segment_BT = torch.randint(0, 5, (2, num_frames)).sort(1).values
            x = torch.randn(2, 4, num_frames, 16)
            expected = block(x, dense_segments(segment_BT, None))
            torch.testing.assert_close(compiled(x, make(segment_BT, None)), expected, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kv_heads", "head_dim", "context"), [(4, 64, None), (2, 8, None), (1, 128, 100)])
@pytest.mark.parametrize("num_frames", [333, 640, 100])
def test_both_paths_agree_on_a_gpu(dtype, kv_heads, head_dim, context, num_frames):
    """Outputs and gradients, those of recomputed blocks too."""
    torch._dynamo.reset()  # it compiles a function only so often
    segment_BT = torch.randint(0, 4, (3, num_frames)).sort(1).values
    segment_BT[0, -20:] = -1
    device = torch.device("cuda")
    kinds = {"dtype": dtype, "device": device}
    heads = random_heads(num_frames, kv_heads=kv_heads, head_dim=head_dim, batch_size=3, **kinds)
    attend = segment_attention(segment_BT, device, context)
    exact = [x.detach().float().cpu().requires_grad_() for x in heads]
    expected = outputs_and_gradients(segment_attention(segment_BT, CPU, context), *exact)
    tolerance = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    for run in (attend, dense_segments(segment_BT.to(device), context)):
        for got, want in zip(outputs_and_gradients(run, *heads), expected, strict=True):
            torch.testing.assert_close(got.float().cpu(), want, rtol=tolerance, atol=tolerance)
    recomputed = outputs_and_gradients(lambda *heads: checkpoint(attend, *heads, use_reentrant=False), *heads)
    torch.testing.assert_close(recomputed, outputs_and_gradients(attend, *heads), rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
def test_segments_never_wait_for_the_gpu():
    device = torch.device("cuda")
    heads = random_heads(384, head_dim=64, device=device)
    segment_BT = torch.randint(0, 4, (4, 384)).sort(1).values
    outputs_and_gradients(segment_attention(segment_BT, device), *heads)  # compilation may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs_and_gradients(segment_attention(segment_BT.flip(0).contiguous(), device), *heads)
    finally:
        torch.cuda.set_sync_debug_mode("default")
