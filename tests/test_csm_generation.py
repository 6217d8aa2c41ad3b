"""Speech from CSM: against transformers' generation, against whole passes, alone and in batches.

Shape legend: B batch, K codebooks, T positions.
"""

import copy
import json

import pytest
import sphn
import torch
from moshi.models import loaders
from torch._subclasses.fake_tensor import FakeTensorMode

from conftest import CPU, QUICKSTART
from finetune.args import LoraArgs
from finetune.data.types import ABSENT
from finetune.errors import UserError
from finetune.families.csm.config import CsmConfig, RopeScaling, TransformerConfig, from_transformers
from finetune.families.csm.layouts import from_layout
from finetune.families.csm.model import CsmModel
from finetune.families.csm.speaking import generate_codes, prompt_codes, stream_audio
from finetune.families.csm.streaming import BackboneStream, DepthStream
from finetune.lora import adapted_layers, add_adapters, merged_weight
from finetune.sampling import Sampling

TEXT_VOCABULARY, AUDIO_VOCABULARY, NUM_CODEBOOKS = 100, 51, 4
AUDIO_ID, AUDIO_END_ID = 98, 99  # transformers' place holders in the text
GREEDY = Sampling(temperature=0.0)


def tiny_model(kv_heads: int = 2, std: float = 0.3) -> CsmModel:
    """Random weights, by default so large that generated frames differ."""
    torch.manual_seed(1)
    config = CsmConfig(
        text_vocab_size=TEXT_VOCABULARY,
        audio_vocab_size=AUDIO_VOCABULARY,
        num_codebooks=NUM_CODEBOOKS,
        backbone=TransformerConfig(64, 96, num_layers=2, num_heads=4, num_kv_heads=kv_heads),
        decoder=TransformerConfig(32, 64, num_layers=2, num_heads=4, num_kv_heads=kv_heads, rope_scaling=RopeScaling()),
    )
    model = CsmModel(config).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=std)
    return model


@pytest.fixture
def model() -> CsmModel:
    return tiny_model()


def random_text(length: int) -> list[int]:
    return torch.randint(2, 90, (length,)).tolist()


def random_audio(num_frames: int) -> torch.Tensor:
    return torch.randint(1, AUDIO_VOCABULARY, (NUM_CODEBOOKS, num_frames))


def prompts_of_any_lengths() -> list[torch.Tensor]:
    """One of text alone, one with a turn before it, one with two."""
    return [
        prompt_codes([], random_text(9), NUM_CODEBOOKS),
        prompt_codes([(random_text(5), random_audio(7))], random_text(4), NUM_CODEBOOKS),
        prompt_codes(
            [(random_text(3), random_audio(2)), (random_text(6), None)], random_text(8), NUM_CODEBOOKS
        ),
    ]  # fmt: skip


def speak(model: CsmModel, prompts: list[torch.Tensor], sampling: Sampling = GREEDY, **settings) -> torch.Tensor:
    """All frames [B, K, T]."""
    settings = {"max_frames": 12, **settings}
    return torch.stack(list(generate_codes(model, prompts, sampling=sampling, **settings)), -1)


def test_prompts_are_turns_of_text_audio_and_an_end():
    codes_KT = prompt_codes([([5, 6], torch.tensor([[1, 2], [3, 4]])), ([7], None)], [8, 9], 2)
    nothing = ABSENT
    assert codes_KT.tolist() == [
        [5, 6, nothing, nothing, nothing, 7, 8, 9],
        [nothing, nothing, 1, 2, 0, nothing, nothing, nothing],
        [nothing, nothing, 3, 4, 0, nothing, nothing, nothing],
    ]


@pytest.fixture(scope="module")
def theirs():
    """transformers' model, with a codec of random weights and random codebooks."""
    transformers = pytest.importorskip("transformers", reason="the extra `transformers` is not installed")
    from test_csm_model import CODEC, rope

    torch.manual_seed(0)
    shared = {
        "num_codebooks": NUM_CODEBOOKS,
        "vocab_size": AUDIO_VOCABULARY,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
    }
    depth = {"hidden_size": 32, "backbone_hidden_size": 64, "max_position_embeddings": NUM_CODEBOOKS + 1}
    config = transformers.CsmConfig(
        **shared,
        hidden_size=64,
        text_vocab_size=TEXT_VOCABULARY,
        max_position_embeddings=64,
        rope_scaling=rope(32),
        audio_token_id=AUDIO_ID,
        audio_eos_token_id=AUDIO_END_ID,
        pad_token_id=0,
        bos_token_id=1,
        codebook_pad_token_id=AUDIO_VOCABULARY - 1,
        depth_decoder_config={**shared, **depth, "rope_scaling": rope(4)},
        codec_config={**CODEC, "num_quantizers": NUM_CODEBOOKS},
    )
    model = transformers.CsmForConditionalGeneration(config).eval().requires_grad_(False)
    for name, tensor in model.state_dict().items():
        if name.endswith("codebook.embed_sum") or (not name.startswith("codec_model") and tensor.dim() > 1):
            tensor.normal_(std=0.3)
    return model


def ours_with_weights_of(theirs) -> CsmModel:
    config = from_transformers(theirs.config.to_dict())
    model = CsmModel(config)
    model.load_state_dict(from_layout(theirs.state_dict(), "transformers", model.state_dict(), config))
    return model


def their_frames(theirs, **inputs) -> torch.Tensor:
    """Greedy frames [1, K, T]."""
    greedy = {"do_sample": False, "depth_decoder_do_sample": False, "max_new_tokens": 25}
    return theirs.generate(**inputs, **greedy).transpose(1, 2)


def test_greedy_speech_equals_transformers(theirs):
    text_ids = random_text(9)
    expected = their_frames(theirs, input_ids=torch.tensor([text_ids]))
    frames = speak(ours_with_weights_of(theirs), [prompt_codes([], text_ids, NUM_CODEBOOKS)], max_frames=25)
    assert torch.equal(frames, expected)
    assert len(expected[0, 0].unique()) > 8  # else any loop would do


def test_greedy_speech_after_a_clip_equals_transformers(theirs):
    wav = torch.randn(1, 1, 6 * 1920)
    codes_KT = theirs.codec_model.encode(wav).audio_codes[0]
    assert len(codes_KT.unique()) > 4
    spoken_ids, text_ids = random_text(5), random_text(7)
    place_holders = [AUDIO_ID] * codes_KT.shape[1] + [AUDIO_END_ID]
    expected = their_frames(
        theirs,
        input_ids=torch.tensor([spoken_ids + place_holders + text_ids]),
        input_values=wav,
        input_values_cutoffs=torch.tensor([[wav.shape[-1]]]),
    )
    ours = ours_with_weights_of(theirs)
    cloning = prompt_codes([(spoken_ids, codes_KT)], text_ids, NUM_CODEBOOKS)
    assert torch.equal(speak(ours, [cloning], max_frames=25), expected)
    plain = prompt_codes([], random_text(3), NUM_CODEBOOKS)
    assert torch.equal(speak(ours, [plain, cloning], max_frames=25)[1:], expected)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("are_alike", [False, True])
@torch.no_grad()
def test_streamed_logits_equal_those_of_a_whole_pass(kv_heads, are_alike):
    model = tiny_model(kv_heads, std=64**-0.5)  # logits of about 1
    prompts = prompts_of_any_lengths()
    prompts = [prompts[1]] * 3 if are_alike else prompts
    frames_BKT = torch.stack([random_audio(10) for _ in prompts])
    backbone = BackboneStream(model, prompts, num_positions=max(prompt.shape[1] for prompt in prompts) + 10)
    depth = DepthStream(model)
    hidden_BD = backbone.start()
    semantic, acoustic = [], []
    for frame_BK in frames_BKT.unbind(-1):
        semantic.append(model.lm_head(hidden_BD))
        logits = [depth.start(hidden_BD, frame_BK[:, 0])]
        logits += [depth.step(code_B) for code_B in frame_BK[:, 1:-1].unbind(1)]
        acoustic.append(torch.stack(logits))
        hidden_BD = backbone.step(frame_BK)
    for row, prompt in enumerate(prompts):
        frames_KT = torch.cat([torch.full((1, 10), ABSENT), frames_BKT[row]])
        codes_KT = torch.cat([prompt, frames_KT], 1)
        hidden_TD = model.hidden_states(codes_KT[None], torch.arange(codes_KT.shape[1])[None])[0, -11:-1]
        streamed = torch.stack([logits_BV[row] for logits_BV in semantic])
        torch.testing.assert_close(streamed, model.lm_head(hidden_TD), rtol=1e-5, atol=1e-5)
        streamed = torch.stack([logits_KBV[:, row] for logits_KBV in acoustic], 1)
        whole = model.depth_logits(hidden_TD, frames_BKT[row, :-1])
        torch.testing.assert_close(streamed, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(seed=5), Sampling(temperature=1.2, top_k=0, top_p=0.9)])
def test_a_text_sounds_the_same_alone_and_among_others(model, sampling):
    prompts = prompts_of_any_lengths()
    together = speak(model, prompts, sampling)
    for row, prompt in enumerate(prompts):
        assert torch.equal(together[row], speak(model, [prompt], sampling)[0])


def test_the_seed_decides(model):
    prompt = prompts_of_any_lengths()[0]
    first = speak(model, [prompt], Sampling(seed=1))
    assert torch.equal(first, speak(model, [prompt], Sampling(seed=1)))
    assert not torch.equal(first, speak(model, [prompt], Sampling(seed=2)))
    thrice = speak(model, [prompt] * 3, Sampling(seed=9), seeds=[1, 2, 1])
    assert torch.equal(thrice[0], first[0])
    assert torch.equal(thrice[2], first[0])
    assert not torch.equal(thrice[1], first[0])


def test_rows_end_each_at_their_own_frame_of_zeros(model):
    # With codes 0 and 1 alone, and all of them likely, one frame in 2^4 is all zeros.
    settings = {"sampling": Sampling(temperature=50.0), "num_entries": 2, "seeds": range(8), "max_frames": 300}
    prompts = [prompt_codes([], random_text(4), NUM_CODEBOOKS)] * 8
    frames_BKT = speak(model, prompts, **settings)
    lengths = []
    for row, frames_KT in enumerate(frames_BKT):
        is_zero_T = (frames_KT == 0).all(0)
        assert is_zero_T.sum() == 1
        length = int(is_zero_T.nonzero())
        assert (frames_KT[:, :length] != ABSENT).all()
        assert (frames_KT[:, length + 1 :] == ABSENT).all()
        alone = speak(model, prompts[:1], **{**settings, "seeds": [row]})[0]
        assert torch.equal(alone, frames_KT[:, : length + 1])
        lengths.append(length)
    assert len(set(lengths)) > 3
    assert frames_BKT.shape[-1] == max(lengths) + 1 < 300


def test_looking_less_often_adds_empty_frames_at_most(model):
    settings = {"sampling": Sampling(temperature=50.0), "num_entries": 2, "max_frames": 300}
    prompts = [prompt_codes([], random_text(4), NUM_CODEBOOKS)]
    exact = speak(model, prompts, **settings)
    late = speak(model, prompts, **settings, frames_per_check=7)
    assert exact.shape[-1] % 7 != 0
    assert late.shape[-1] == -(-exact.shape[-1] // 7) * 7
    assert torch.equal(late[..., : exact.shape[-1]], exact)
    assert (late[..., exact.shape[-1] :] == ABSENT).all()


def test_speech_that_does_not_end_is_cut_off(model):
    frames_BKT = speak(model, prompts_of_any_lengths(), max_frames=5)
    assert frames_BKT.shape[-1] == 5
    assert not (frames_BKT == 0).all(1).any()
    assert (frames_BKT != ABSENT).all()


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_no_row_goes_past_the_last_position(model, order):
    prompts = [prompts_of_any_lengths()[index] for index in order]
    frames_BKT = speak(model, prompts, max_frames=40, max_positions=30)
    unlimited = speak(model, prompts, max_frames=40)
    assert frames_BKT.shape[-1] == 30 - min(prompt.shape[1] for prompt in prompts)
    for row, prompt in enumerate(prompts):
        room = 30 - prompt.shape[1]
        assert torch.equal(frames_BKT[row, :, :room], unlimited[row, :, :room])
        assert (frames_BKT[row, :, room:] == ABSENT).all()


def test_a_prompt_without_room_for_speech_is_named(model):
    long = prompt_codes([(random_text(3), random_audio(2040))], random_text(4), NUM_CODEBOOKS)
    with pytest.raises(UserError, match=r"text 2 of 2 .* 2,048 positions, the model has 2,048; give fewer"):
        speak(model, [prompts_of_any_lengths()[0], long])
    assert speak(model, [long[:, 1:]]).shape[-1] == 1


def adapted(model: CsmModel) -> CsmModel:
    """The model with adapters that matter, and with dropout, which must not act."""
    model = copy.deepcopy(model)
    add_adapters(model, LoraArgs(rank=4, scaling=1.5, dropout=0.5))
    for layer in adapted_layers(model).values():
        layer.lora_A.weight.data.normal_(std=0.1)
        layer.lora_B.weight.data.normal_(std=0.1)
    return model


def test_adapters_speak_as_their_merged_copy(model):
    with_adapters, merged = adapted(model), copy.deepcopy(model)
    for name, layer in adapted_layers(with_adapters).items():
        weight = merged_weight(layer.weight, layer.lora_A.weight, layer.lora_B.weight, layer.scaling)
        merged.get_submodule(name).weight.data.copy_(weight.detach())
    assert len(adapted_layers(with_adapters)) == 2 * (2 * 7) + 2
    prompts = prompts_of_any_lengths()
    frames = speak(with_adapters.train(), prompts)
    assert with_adapters.training
    assert torch.equal(frames, speak(merged, prompts))
    assert not torch.equal(frames, speak(model, prompts))


def test_nothing_but_the_check_waits_for_the_device(model):
    """Tensors without data: whatever reads a value on the host, as `.item()` or a condition does, raises."""
    prompts = prompts_of_any_lengths()
    with FakeTensorMode(allow_non_fake_inputs=True):
        frames = generate_codes(model, prompts, max_frames=20, sampling=Sampling(), frames_per_check=4)
        assert len([next(frames) for _ in range(4)]) == 4
        with pytest.raises(Exception, match=r"item|bool|_local_scalar_dense"):
            next(frames)


def test_half_precision_speaks(model):
    half = copy.deepcopy(model).bfloat16()
    frames = speak(half, prompts_of_any_lengths(), Sampling())
    assert frames.shape == (3, NUM_CODEBOOKS, 12)
    assert ((frames >= 0) & (frames < AUDIO_VOCABULARY)).all()


@pytest.mark.gpu
def test_a_gpu_says_what_the_cpu_says(model):
    prompts = prompts_of_any_lengths()
    for sampling in (GREEDY, Sampling(seed=3)):
        expected = speak(model, prompts, sampling)
        assert torch.equal(speak(copy.deepcopy(model).cuda(), prompts, sampling).cpu(), expected)
    half = speak(copy.deepcopy(model).cuda().bfloat16(), prompts, Sampling()).cpu()
    assert ((half >= 0) & (half < AUDIO_VOCABULARY)).all()


@pytest.fixture(scope="module")
def mimi():
    config = json.loads((QUICKSTART / "tiny_mimi_config.json").read_text())
    return loaders.get_mimi(QUICKSTART / "tiny_mimi.safetensors", config, CPU, num_codebooks=16)


@pytest.fixture(scope="module")
def spoken(mimi) -> torch.Tensor:
    """Codes [1, K, T] of ten seconds of real speech."""
    wav_CS, _ = sphn.read(QUICKSTART / "dialogues" / "audio" / "dialogue_001.flac", sample_rate=24_000)
    with torch.no_grad():
        return mimi.encode(torch.from_numpy(wav_CS.sum(0)[None, None, : 125 * 1920]))


@torch.no_grad()
def whole_audio(mimi, codes_1KT: torch.Tensor) -> torch.Tensor:
    return mimi.decode(codes_1KT)[0, 0]


def joined(chunks: list, row: int) -> torch.Tensor:
    return torch.cat([torch.from_numpy(chunk.wavs[row]) for chunk in chunks])


def test_streamed_audio_equals_whole_audio(mimi, spoken):
    whole_S = whole_audio(mimi, spoken)
    chunks = list(stream_audio(mimi, spoken.unbind(-1)))
    assert {chunk.wavs[0].shape for chunk in chunks} == {(mimi.frame_size,)}
    assert not any(chunk.ended[0] for chunk in chunks)
    assert not mimi.is_streaming
    streamed_S = joined(chunks, 0)
    # The attention of the tiny codec reaches over 32 positions of 40 ms.
    exact = 16 * mimi.frame_size
    torch.testing.assert_close(streamed_S[:exact], whole_S[:exact], rtol=0, atol=1e-5)
    error_power = (streamed_S - whole_S)[exact:].square().mean()
    assert 10 * torch.log10(whole_S[exact:].square().mean() / error_power) > 35


def test_rows_that_are_over_give_nothing(mimi, spoken):
    frames_BKT = spoken[..., :12].repeat(3, 1, 1)
    for row, length in enumerate([5, 9]):
        frames_BKT[row, :, length] = 0
        frames_BKT[row, :, length + 1 :] = ABSENT
    frames_BKT[2, :, 7:] = ABSENT  # cut off
    chunks = list(stream_audio(mimi, frames_BKT.unbind(-1)))
    assert len(chunks) == 10  # the last one tells of an end alone
    for row, length in enumerate([5, 9, 7]):
        expected_S = whole_audio(mimi, spoken[..., :length])
        torch.testing.assert_close(joined(chunks, row), expected_S, rtol=0, atol=1e-5)
        assert [chunk.ended[row] for chunk in chunks] == [row < 2 and index >= length for index in range(10)]


def test_audio_that_is_not_heard_to_its_end_leaves_the_codec_free(mimi, spoken):
    chunks = stream_audio(mimi, spoken.unbind(-1))
    next(chunks)
    assert mimi.is_streaming
    chunks.close()
    assert not mimi.is_streaming
