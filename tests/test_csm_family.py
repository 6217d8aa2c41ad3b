"""The family around CSM: samples, packing, adapters, and the same losses as transformers on the same conversation."""

import json

import numpy as np
import pytest
import sphn
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from conftest import CPU, QUICKSTART, csm_args, make_csm, read_lines, run_module, write_config
from finetune import args as configuration
from finetune.data.types import ABSENT, SAMPLE_RATE_HZ, Conversation, Turn, collate
from finetune.errors import UserError
from finetune.families import args_class
from finetune.families.base import Line
from finetune.families.csm.family import CsmArgs, CsmFamily
from finetune.generate import open_model, read_context, speak
from finetune.loss import denominators, local_loss, stream_sums, summarize
from finetune.parallel import materialize
from finetune.sampling import Sampling

SPEECH = [QUICKSTART / "ljspeech" / "audio" / name for name in ("LJ001-0002.flac", "LJ001-0008.flac")]
TEXTS = ["in being comparatively modern.", "has never been surpassed."]


def speech(number: int, num_frames: float) -> np.ndarray:
    """The first frames of a clip; this codec's whole-file codes are transformers' for 16 of them."""
    wav_CS, _ = sphn.read(str(SPEECH[number]), sample_rate=SAMPLE_RATE_HZ)
    return np.ascontiguousarray(wav_CS[0, 12000 : 12000 + round(num_frames * 1920)])


def conversation(*turns: Turn) -> Conversation:
    return Conversation(turns, path="test")


def load(family: CsmFamily) -> torch.nn.Module:
    model = family.create(torch.device("meta"))
    materialize(model, family.weights(), CPU, seed=0)
    return model


def means(family: CsmFamily, model: torch.nn.Module, batch) -> dict[str, float]:
    return summarize(stream_sums(family.nll(model, batch), batch.loss_weight_BKT), family.terms)


def test_losses_equal_transformers_from_the_same_folder_and_audio(tiny_csm):
    """Tokenizer, template, codec, end-of-speech frame, labels and both losses, all through transformers' own code."""
    transformers = pytest.importorskip("transformers", reason="the extra `transformers` is not installed")
    family = CsmFamily(csm_args(tiny_csm), CPU)
    turns = [Turn(text, str(index), speech(index, 12), is_trained=True) for index, text in enumerate(TEXTS)]
    (sample,) = family.tokenize([conversation(*turns)], [None], evaluation=True)
    ours = means(family, load(family), collate([[sample]]))

    processor = transformers.AutoProcessor.from_pretrained(tiny_csm)
    theirs = transformers.CsmForConditionalGeneration.from_pretrained(tiny_csm, dtype=torch.float32).eval()
    messages = [
        {
            "role": turn.speaker,
            "content": [{"type": "text", "text": turn.text}, {"type": "audio", "audio": turn.wav_S}],
        }
        for turn in turns
    ]
    inputs = processor.apply_chat_template([messages], tokenize=True, return_dict=True, output_labels=True)
    assert inputs["input_ids"].shape[-1] == sample.codes_KT.shape[1]
    text = sample.codes_KT[0]
    assert torch.equal(inputs["input_ids"][0, text != ABSENT], text[text != ABSENT])
    with torch.no_grad():
        reference = theirs(**inputs)
    assert ours["semantic_loss"] == pytest.approx(reference.backbone_loss.item(), rel=1e-5)
    assert ours["acoustic_loss"] == pytest.approx(reference.depth_decoder_loss.item(), rel=1e-5)


def test_a_packed_batch_gives_the_losses_of_one_by_one(csm_family):
    """Real turns of unlike lengths, three in a row and one alone in the next."""
    model = load(csm_family)
    turns = [Turn(TEXTS[index % 2], str(index), speech(index % 2, 3.3 + 2 * index), True) for index in range(4)]
    samples = csm_family.tokenize([conversation(turn) for turn in turns], [np.random.default_rng(5)] * 4)
    packed = collate([samples[:3], samples[3:]], num_frames=160)
    nll_BKT = csm_family.nll(model, packed)
    places = [(0, 0), (0, 1), (0, 2), (1, 0)]
    for sample, (row, segment) in zip(samples, places, strict=True):
        alone_KT = csm_family.nll(model, collate([[sample]]))[0]
        inside_KT = nll_BKT[row, :, packed.segment_BT[row] == segment]
        torch.testing.assert_close(inside_KT, alone_KT, rtol=1e-5, atol=1e-5)
        assert alone_KT.sum() > 0


def test_context_turns_are_heard_and_not_learned(csm_family):
    context, spoken = Turn(TEXTS[0], "0", speech(0, 5), False), Turn(TEXTS[1], "1", speech(1, 4), True)
    (sample,) = csm_family.tokenize([conversation(context, spoken)], [None], evaluation=True)
    trained = (sample.loss_weight_KT[1] > 0).nonzero().flatten()
    assert len(trained) == 5  # four frames and the end
    assert (sample.codes_KT[1:, trained[-1]] == 0).all()
    assert trained[0] > csm_family.count_text("0", TEXTS[0]) + 6 + csm_family.count_text("1", TEXTS[1]) - 1
    model = load(csm_family)
    alone = csm_family.tokenize([conversation(spoken)], [None], evaluation=True)
    heard = means(csm_family, model, collate([[sample]]))["semantic_loss"]
    assert heard != pytest.approx(means(csm_family, model, collate([alone]))["semantic_loss"], rel=1e-6)


def test_cut_audio_teaches_no_end(csm_family):
    cut = Turn(TEXTS[0], "0", speech(0, 5), True, is_cut=True)
    (sample,) = csm_family.tokenize([conversation(cut)], [None], evaluation=True)
    assert (sample.loss_weight_KT[1] > 0).sum() == 5
    assert not (sample.codes_KT[1:] == 0).all(0).any()


def test_text_follows_the_template(tiny_csm):
    family = CsmFamily(csm_args(tiny_csm, text_template="<{speaker}> {text}"), CPU)
    (sample,) = family.tokenize([conversation(Turn("hello", "7", speech(0, 1), True))], [None], evaluation=True)
    ids = sample.codes_KT[0][sample.codes_KT[0] != ABSENT].tolist()
    assert family._tokenizer._tokenizer.decode(ids) == "<7> hello"
    assert family.count_text("7", "hello") == len(ids)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"text_template": "{speaker}"}, "text_template"),
        ({"text_template": "[{speaker}]{text}{mood}"}, "text_template"),
        ({"text_template": "{text!x}"}, "text_template: '{text!x}' must hold plain"),
        ({"text_template": "{text:d}"}, "text_template: '{text:d}' must hold plain"),
        ({"text_template": "{speaker!r}{text}"}, "text_template"),
        ({"amortization": 0}, "amortization: 0 is below 1"),
        ({"first_codebook_weight_multiplier": 1.0, "decoder_loss_weight": 0.5}, "decoder_loss_weight: set beside"),
        ({"decoder_loss_weight": 1.5}, "decoder_loss_weight: 1.5"),
        ({"first_codebook_weight_multiplier": -1.0}, "first_codebook_weight_multiplier: -1.0 is negative"),
        ({"architecture": {}}, "set model.path"),
    ],
)
def test_wrong_settings_are_named(settings, says):
    with pytest.raises(ValueError, match=says.replace(".", r"\.")):
        CsmArgs(**settings)


def test_a_tokenizer_without_the_marks_is_named(tiny_csm):
    with pytest.raises(UserError, match=r"model\.bos_token: '<s>' is not a token of"):
        CsmFamily(csm_args(tiny_csm, bos_token="<s>"), CPU)


@pytest.mark.parametrize(
    ("architecture", "says"),
    [
        ({"num_codebook": 4}, "architecture.num_codebook: unknown key"),
        ({"num_codebooks": 17}, "architecture.num_codebooks: 17 is not a number from 2 to the codec's 16"),
        ({"backbone": {"width": 3}}, "architecture.backbone"),
        ({"backbone": {"num_layers": 0}}, "architecture.backbone.num_layers: 0"),
        ({"decoder": {"num_heads": 3}}, "architecture.decoder: hidden_size must be"),
    ],
)
def test_a_wrong_architecture_is_named(architecture, says, tmp_path):
    with pytest.raises(UserError, match=says.replace(".", r"\.")):
        make_csm(tmp_path / "new", **architecture)


def test_a_model_is_made_once_and_another_one_is_not_taken_for_it(tmp_path):
    folder = make_csm(tmp_path / "new")
    before = (folder / "model.safetensors").stat().st_mtime_ns
    make_csm(folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="was made otherwise"):
        make_csm(folder, num_codebooks=5)


def build(csm_config, tmp_path, **settings):
    args = configuration.load(write_config(tmp_path, csm_config | settings), {}, args_class)
    family = train.build_family(args, CPU)
    model, groups = train.build_model(args, family, torch.float32, CPU)
    return args, family, model, groups


PARTS = {
    "backbone": ("backbone_model.layers.", "backbone_model.norm.", "lm_head."),
    "decoder": ("depth_decoder.",),
    "embeddings": ("embed_text_tokens.", "backbone_model.embed_tokens."),
}


@pytest.mark.parametrize("part", PARTS)
def test_one_part_can_be_trained_in_full(part, csm_config, tmp_path):
    _, _, model, groups = build(csm_config, tmp_path, finetuning="full", train_only=[part])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith(PARTS[part])}
    assert sum(len(group["params"]) for group in groups) == len(trained)


@pytest.mark.parametrize("part", ["backbone", "decoder"])
def test_one_part_can_be_adapted(part, csm_config, tmp_path):
    _, _, model, _ = build(csm_config, tmp_path, train_only=[part])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(name.startswith(PARTS[part]) for name in trained)


def test_a_part_without_anything_to_train_is_named(csm_config, tmp_path):
    with pytest.raises(UserError, match=r"train_only: 'depformer' is not a part of this model; it has backbone"):
        build(csm_config, tmp_path, train_only=["depformer"])
    with pytest.raises(UserError, match=r"train_only: \['embeddings'\]: nothing to train"):
        build(csm_config, tmp_path, train_only=["embeddings"])


@pytest.mark.dist
def test_an_adapter_file_of_a_run_is_the_trained_model_in_peft(csm_config, tmp_path):
    """Train, save, load with transformers and peft alone: the same logits."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    transformers = pytest.importorskip("transformers", reason="the extra `transformers` is not installed")
    lora = {"rank": 4, "alpha": 8, "rslora": True}
    settings = {"do_ckpt": True, "lora": lora, "max_steps": 3, "optim": {"lr": 1e-2}}
    path = write_config(tmp_path, csm_config | settings)
    assert run_module("train", path).returncode == 0
    folder = tmp_path / "run" / "checkpoints" / "checkpoint_000003" / "consolidated"
    saved = json.loads((folder / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], saved["use_rslora"]) == (4, 8.0, True)
    base = transformers.CsmForConditionalGeneration.from_pretrained(csm_config["model"]["path"], dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, folder).eval()
    _, family, model, _ = build(csm_config, tmp_path, **settings)
    _, tensors = family.read_adapter(folder)
    model.load_state_dict(tensors, strict=False)
    codes_BKT = torch.randint(1, 500, (1, 5, 12))
    codes_BKT[:, 0] = ABSENT
    with torch.no_grad():
        hidden_BTD = model.eval().hidden_states(codes_BKT, torch.arange(12)[None])
        expected = theirs(input_ids=codes_BKT[:, 1:].transpose(1, 2)).logits
        torch.testing.assert_close(model.lm_head(hidden_BTD), expected, rtol=1e-4, atol=1e-4)
        plain = base_logits(csm_config["model"]["path"], transformers, codes_BKT)
    assert not torch.allclose(plain, expected, atol=1e-3)


def base_logits(path, transformers, codes_BKT):
    model = transformers.CsmForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    return model(input_ids=codes_BKT[:, 1:].transpose(1, 2)).logits


@pytest.mark.dist
@pytest.mark.parametrize("finetuning", ["full", "lora"])
def test_any_split_of_a_packed_batch_trains_the_same(finetuning, csm_config, tmp_path):
    """One rank with two microbatches, two ranks sharded, and one rank with two rows: losses and gradient norms."""
    csm_config["model"]["amortization"] = 4
    records = {}
    for name, ranks, layout in [
        ("microbatches", 1, {"num_microbatches": 2, "batch_size": 1}),
        ("rows", 1, {"num_microbatches": 1, "batch_size": 2}),
        ("ranks", 2, {"num_microbatches": 1, "batch_size": 1, "parallel": {"strategy": "fsdp"}}),
    ]:
        run = csm_config | layout | {"run_dir": str(tmp_path / name), "finetuning": finetuning, "max_steps": 4}
        run["do_eval"] = True  # with fewer rows than two ranks take in their rounds
        result = run_module("train", write_config(tmp_path, run), ranks=ranks)
        assert result.returncode == 0, result.stderr
        records[name] = read_lines(tmp_path / name / "metrics.train.jsonl")
    for name in ("rows", "ranks"):
        for key in ("loss", "semantic_loss", "acoustic_loss", "acoustic_loss_3"):
            got = [record[key] for record in records[name]]
            assert got == pytest.approx([record[key] for record in records["microbatches"]], rel=1e-5), (name, key)
        norms = [record["grad_norm"] for record in records[name]]
        assert norms == pytest.approx([record["grad_norm"] for record in records["microbatches"]], rel=1e-3), name
    evaluated = [read_lines(tmp_path / name / "metrics.eval.jsonl")[0]["loss"] for name in records]
    assert evaluated == pytest.approx([evaluated[0]] * 3, rel=1e-4)


@pytest.mark.dist
def test_eight_bit_states_shard(csm_config, tmp_path):
    """8-bit AdamW over two ranks' shards trains like AdamW."""
    pytest.importorskip("torchao", reason="the extra `lowbit` is not installed")
    losses = {}
    for name in ("adamw", "adamw8bit"):
        run = csm_config | {
            "run_dir": str(tmp_path / name),
            "finetuning": "full",
            "parallel": {"strategy": "fsdp"},
            "max_steps": 6,
            "optim": {"name": name, "lr": 3e-3, "schedule": "cosine"},
        }
        # torchao compiles its step, which takes a minute on a small machine.
        result = run_module("train", write_config(tmp_path, run), ranks=2, TORCHDYNAMO_DISABLE="1")
        assert result.returncode == 0, result.stderr
        losses[name] = [record["loss"] for record in read_lines(tmp_path / name / "metrics.train.jsonl")]
    assert losses["adamw8bit"] == pytest.approx(losses["adamw"], rel=0.01)
    assert losses["adamw8bit"][1:] != losses["adamw"][1:]
    assert losses["adamw8bit"][-1] < losses["adamw8bit"][0]


@pytest.mark.dist
def test_samples_are_spoken_judged_and_kept(csm_config, tmp_path):
    """Every generate.freq steps, with and without a voice, from a model that is sharded over two ranks."""
    run = csm_config | {
        "finetuning": "full",
        "parallel": {"strategy": "fsdp"},
        "tensorboard": True,
        "do_ckpt": True,
        "generate": {
            "freq": 2,
            "max_sec": 0.4,
            "temperature": 0.7,
            "seed": 5,
            "sentences": ["hello"],
            "context_audio": str(SPEECH[0]),
            "context_text": TEXTS[0],
        },
    }
    result = run_module("train", write_config(tmp_path, run), ranks=2)
    assert result.returncode == 0, result.stderr
    lines = read_lines(tmp_path / "run" / "metrics.samples.jsonl")
    assert [(line["step"], line["name"]) for line in lines] == [
        (step, name) for step in (2, 3) for name in ("1_plain", "1_context")
    ]
    for line in lines:
        wav_CS, rate_hz = sphn.read(str(tmp_path / "run" / line["path"]))
        assert rate_hz == SAMPLE_RATE_HZ
        assert wav_CS.shape == (1, round(line["length_sec"] * rate_hz))
        assert line["length_sec"] <= 0.4
        assert line.keys() >= {"silent_share", "ended", "peak", "clipped_share"}
        assert (tmp_path / "run" / line["path"]).with_suffix(".txt").read_text() == "hello\n"
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert set(board.Tags()["audio"]) == {"samples/1_plain", "samples/1_context"}
    # The last ones are what the checkpoint says of the same line with the same settings, and of none other.
    context, asked = [read_context(SPEECH[0], TEXTS[0], "0")], Sampling(temperature=0.7, seed=5)
    family, model = open_model(str(tmp_path / "run"), device=CPU)

    def spoken(context: list[Turn], sampling: Sampling) -> np.ndarray:
        return speak(family, model, [Line("hello", "0", context)], sampling, 0.4)[0].wav_S

    def is_same(one_S: np.ndarray, other_S: np.ndarray) -> bool:
        return one_S.shape == other_S.shape and np.allclose(one_S, other_S, atol=1e-3)

    for line, said in zip(lines[2:], ([], context), strict=True):
        wav_S = sphn.read(str(tmp_path / "run" / line["path"]))[0][0]
        assert is_same(wav_S, spoken(said, asked))
        others = [([], asked)] if said else [(context, asked)]
        others += [(said, Sampling(seed=5)), (said, Sampling(temperature=0.7))]
        assert not any(is_same(wav_S, spoken(*other)) for other in others)


def test_speaking_while_training_leaves_the_training_as_it_is(csm_config, tmp_path):
    """The same losses with and without samples: neither random numbers nor the codec's state leak."""
    records = []
    for name, freq in (("silent", 0), ("spoken", 1)):
        run = csm_config | {
            "run_dir": str(tmp_path / name),
            "lora": {"rank": 2, "dropout": 0.3},
            "generate": {"freq": freq, "max_sec": 0.3, "sentences": ["hello"]},
        }
        args = configuration.load(write_config(tmp_path, run), {}, args_class)
        train.train(args)
        records.append(read_lines(tmp_path / name / "metrics.train.jsonl"))
    for silent, spoken in zip(*records, strict=True):
        assert silent["loss"] == spoken["loss"]
        assert silent["grad_norm"] == spoken["grad_norm"]


def test_samples_are_refused_where_nothing_speaks(config, tmp_path):
    path = write_config(tmp_path, config | {"generate": {"freq": 1}})
    with pytest.raises(UserError, match=r"generate\.freq: 1: this family does not speak texts; set 0"):
        train.train(configuration.load(path, {}, args_class))


def test_one_batch_is_learned_by_heart(csm_config, tmp_path):
    """The loss falls by half, and the greedy voice then says the codes it was taught."""
    settings = {"finetuning": "full", "gradient_checkpointing": False}
    _, family, model, groups = build(csm_config, tmp_path, **settings)
    turn = Turn(TEXTS[0], "0", speech(0, 8), is_trained=True)
    (sample,) = family.tokenize([conversation(turn)], [None], evaluation=True)
    batch = collate([[sample]])
    optimizer = torch.optim.AdamW(groups, lr=5e-3)
    for _ in range(60):
        loss = local_loss(
            family.nll(model, batch), batch.loss_weight_BKT, family.terms, denominators([batch], family.terms)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    (said,) = speak(family, model, [Line(TEXTS[0], "0")], Sampling(temperature=0.0), max_sec=2.0)
    assert said.ended
    assert len(said.wav_S) == 8 * family.frame_size
    wav_S = family._mimi.decode(sample.codes_KT[1:, -9:-1][None])[0, 0].numpy()
    np.testing.assert_allclose(said.wav_S, wav_S, atol=1e-4)
