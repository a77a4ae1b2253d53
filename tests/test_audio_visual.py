"""IIANet with its lip front-end: two graphs from one checkpoint to a bundle that separates whom it sees."""

import json

import conftest
import numpy as np
import pytest
import torch
from conftest import write_set

from edgesep import InputError, Stream, load_separator, open_bundle, video
from edgesep.calibration import MixtureSet
from edgesep.line import deploy
from edgesep.passes.finetune import Remix
from edgesep.separators import iianet, lip
from edgesep.store import Store
from edgesep.verify import output_snr_db

CONFIG = {
    "out_channels": 16,
    "in_channels": 16,
    "vpre_channels": 16,
    "vin_channels": 8,
    "vout_channels": 8,
    "num_blocks": 2,
    "upsampling_depth": 3,
    "enc_kernel_size": 8,
    "num_sources": 1,
}
# Random weights give no figure to keep.
RECIPE = conftest.RECIPE.replace("drop_db = 3.0", "drop_db = 30.0").replace("{targets}", conftest.TARGETS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """One Lightning file with both graphs."""
    torch.manual_seed(0)
    audio, front = iianet.create(CONFIG, 8000), lip.create({"stem": 2}, 0)
    with torch.no_grad():
        for value in front.module.state_dict().values():
            if value.dtype == torch.float32 and value.ndim == 1:
                value += 0.1 * torch.rand_like(value)
    state = {f"audio_model.{k}": v for k, v in iianet.to_authors(audio.module).items()}
    state |= {f"video_model.{k}": v for k, v in lip.to_authors(front.module).items()}
    conf = {
        "audionet": {"audionet_name": "IIANet", "audionet_config": audio.config},
        "datamodule": {"data_config": {"sample_rate": 8000}},
    }
    file = tmp_path_factory.mktemp("iianet") / "last.ckpt"
    torch.save({"state_dict": state, "conf": conf}, file)
    return file


def mouth(frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, 96, 96), np.uint8)


@pytest.fixture(scope="module")
def seen_mixtures(tmp_path_factory):
    root = write_set(tmp_path_factory.mktemp("sets") / "seen")
    (root / "mouth").mkdir()
    for i, file in enumerate(sorted((root / "s1").iterdir())):
        np.savez(root / "mouth" / f"{file.stem}.npz", data=mouth(20 + i % 2, i))
    return root


@pytest.fixture(scope="module")
def bundle(checkpoint, seen_mixtures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("seen")
    (folder / "recipe.toml").write_text(RECIPE.format(checkpoint=checkpoint, mixtures=seen_mixtures))
    done = deploy(folder / "recipe.toml", folder / "bundle", store=Store(folder / "cache"))
    assert done.ok, done.rows
    return open_bundle(folder / "bundle")


def test_both_graphs_are_exported_quantized_and_verified(bundle):
    rows = {(r["runtime"], r["precision"]): r for r in bundle.manifest["results"]}
    for name in ("onnxruntime", "openvino"):
        assert rows[name, "fp32"]["output_snr_db"] >= 80
        assert rows[name, "fp32"]["shapes_snr_db"] >= 80
    graphs = {p["graph"]: p["report"]["quantized_macs_share"] for p in bundle.manifest["passes"]}
    assert graphs["IIANet"] > 0.5
    assert graphs["ResNetVideoModel"] > 0.2  # its first convolution, most of the work at this size, stays in float
    assert bundle.manifest["separator"]["front_end"]["parameters"] > 0
    files = [f for f in bundle.manifest["files"] if f.startswith("artifacts/front-end/onnxruntime-int8")]
    assert files


def test_the_bundle_verifies_and_measures_both(bundle):
    assert all(r["status"] == "ok" for r in bundle.verify())
    row = bundle.bench(0.2)[0]
    assert row["p50_ms"] > 0
    fp32 = bundle.artifact("onnxruntime", "fp32")
    assert len(fp32.graphs()) == 2


def test_separating_equals_the_original(bundle, checkpoint):
    separator = load_separator(checkpoint)
    x = separator.example_inputs(8000)[0].numpy()[0]
    seen = mouth(25)
    expected = separator(x, video.crops(seen)).numpy()
    assert output_snr_db(bundle.separate(x, seen, runtime="onnxruntime", precision="fp32"), expected) >= 80


def test_what_is_seen_matters(bundle):
    x = np.random.default_rng(1).standard_normal(8000).astype(np.float32)
    a, b = (bundle.separate(x, mouth(25, seed)) for seed in (1, 2))
    assert output_snr_db(a, b) < 60


def test_video_missing_or_not_wanted_is_said(bundle, deployed):
    x = np.random.default_rng(1).standard_normal(8000).astype(np.float32)
    with pytest.raises(InputError, match="needs the mouth video"):
        bundle.separate(x)
    with pytest.raises(InputError, match="audio alone"):
        open_bundle(deployed[0].path).separate(x, mouth(25))


def test_short_video_ends_frozen_and_long_video_is_cut():
    made = video.crops(mouth(25))
    longer = video.fit(made, 9000, 8000)
    assert longer.shape[1] == 28
    np.testing.assert_array_equal(longer[:, 25:], np.repeat(made[:, 24:25], 3, 1))
    np.testing.assert_array_equal(video.fit(made, 7400, 8000), made[:, :23])


def test_late_video_starts_grey():
    made = video.crops(mouth(20))
    late = video.fit(made, 8000, 8000, late_s=0.2)
    assert not late[:, :5].any()
    np.testing.assert_array_equal(late[:, 5:], made)


def test_frozen_video_is_used_as_it_is(bundle):
    x = np.random.default_rng(1).standard_normal(8000).astype(np.float32)
    frozen = np.repeat(mouth(1), 25, 0)
    assert np.isfinite(bundle.separate(x, frozen)).all()


@pytest.mark.parametrize("frames", [18, 32, 50])
def test_another_frame_rate_is_said_with_the_tolerance(frames):
    with pytest.raises(InputError, match=r"25 at 25 frames a second \(0.2 s \+ 5 % off at most\)"):
        video.fit(video.crops(mouth(frames)), 8000, 8000)


@pytest.mark.parametrize("made", ["text", "shape", "small", "key"])
def test_files_that_are_no_mouth_video(tmp_path, made):
    file = tmp_path / "mouth.npz"
    if made == "text":
        file.write_text("not a video")
    elif made == "shape":
        np.savez(file, data=np.zeros((4, 88, 88, 3), np.uint8))
    elif made == "small":
        np.savez(file, data=np.zeros((4, 60, 88), np.uint8))
    else:
        np.savez(file, frames=np.zeros((4, 88, 88), np.uint8))
    with pytest.raises(InputError, match=r"mouth\.npz"):
        video.read(file)
    with pytest.raises(InputError, match="does not exist"):
        video.read(tmp_path / "none.npz")


def test_embedding_of_another_width_is_refused(checkpoint, golden):
    with pytest.raises(InputError, match="512 channels, IIANet was trained with 16"):
        load_separator(checkpoint, front_end=golden("lip_frontend").checkpoint)


def test_front_end_of_an_audio_separator_is_refused(golden):
    with pytest.raises(InputError, match="audio alone"):
        load_separator(golden("tdanet_small").checkpoint, front_end=golden("lip_frontend").checkpoint)


def test_authors_files_need_the_front_end_named(golden, seen_mixtures, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(checkpoint=golden("iianet_small").checkpoint, mixtures=seen_mixtures))
    with pytest.raises(InputError, match=r"separator\.front_end"):
        deploy(recipe, tmp_path / "bundle")


def test_a_set_without_video_is_refused(checkpoint, mixtures, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(checkpoint=checkpoint, mixtures=mixtures))
    with pytest.raises(InputError, match="mouth video in"):
        deploy(recipe, tmp_path / "bundle")


def test_finetuning_shows_the_mouth_of_the_voice_it_asks_for(checkpoint, seen_mixtures):
    separator = load_separator(checkpoint)
    mixture_set = MixtureSet.open(seen_mixtures, separator.sample_rate_hz, separator.sources, mouth=True)
    shortest = min(m.mixture.size for m in mixture_set)
    remix = Remix(mixture_set, range(len(mixture_set)), 10 * shortest, separator)
    (mixture, embedding), sources = remix(np.random.default_rng(0), 2)
    assert mixture.shape == (2, shortest), "video cannot be padded"
    assert sources.shape == (2, 1, shortest)
    assert embedding.shape[2] == round(shortest / separator.sample_rate_hz * 25)
    whole = [remix.whole(item)[0][1][0] for item in mixture_set]
    for b in range(2):
        scale = [float((sources[b, 0] @ torch.from_numpy(m.sources[0, :shortest])) ** 2) for m in mixture_set]
        shown = whole[int(np.argmax(scale))][:, : embedding.shape[2]]
        torch.testing.assert_close(embedding[b], shown)


def test_a_command_separates_whom_it_is_shown(bundle, tmp_path, capsys):
    import soundfile

    from edgesep import cli

    x = np.random.default_rng(1).standard_normal(16000) * 0.1
    soundfile.write(tmp_path / "mix.wav", x, 8000)
    np.savez(tmp_path / "mouth.npz", data=mouth(48))
    with pytest.raises(SystemExit) as ended:
        cli.app(
            [
                "separate",
                str(bundle.path),
                str(tmp_path / "mix.wav"),
                "--mouth",
                str(tmp_path / "mouth.npz"),
                "--out",
                str(tmp_path / "out"),
                "--block-s",
                "0.9",
            ]
        )
    assert ended.value.code == 0
    assert "mix_s1.wav" in capsys.readouterr().out
    assert soundfile.read(tmp_path / "out" / "mix_s1.wav")[0].size == 16000


def test_manifest_is_plain_json(bundle):
    json.dumps(bundle.manifest)


def test_shown_frames_are_those_of_the_newest_block():
    shown = video.Shown(8000, 8000)  # a second: 25 frames
    frames = np.arange(60, dtype=np.uint8)[:, None, None].repeat(88, 1).repeat(88, 2)
    shown.add(frames[:20])
    shown.add(frames[20:])
    numbers = [crop[0, 0] for crop in shown.until(4000)[0, 0]]
    assert numbers[:13] == [0] * 13  # grey before the video
    np.testing.assert_allclose(shown.until(4000)[0, 0, 13:], video.crops(frames[:12])[0])
    np.testing.assert_allclose(shown.until(12000)[0], video.crops(frames[13:38]))
    np.testing.assert_allclose(shown.until(19200)[0], video.crops(frames[35:60]))
    late = shown.until(20000)[0, 0]  # two frames are missing: the last one stays
    np.testing.assert_allclose(late[-3:], video.crops(frames[[59, 59, 59]])[0])
    with pytest.raises(InputError, match="60 frames of mouth video were shown"):
        shown.until(32000)


def test_an_audio_visual_separator_goes_on_in_blocks(bundle):
    x = (0.1 * np.random.default_rng(0).standard_normal(3 * bundle.sample_rate_hz)).astype(np.float32)
    frames = video.frames_for(x.size, bundle.sample_rate_hz)
    with Stream(bundle, runtime="onnxruntime", block_s=1.0) as stream:
        one, other = (stream.separate(x, mouth(frames, seed)) for seed in (1, 2))
        assert one.shape == (1, x.size)
        assert np.isfinite(one).all()
        assert not np.array_equal(one, other)
        with pytest.raises(InputError, match="0 frames of mouth video were shown"):
            stream.separate(x)
