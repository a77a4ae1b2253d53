"""Train one of the packaged demo separators on speech synthesised with espeak-ng.

    python benchmarks/train_demo.py --separator TDANet
    python benchmarks/train_demo.py --separator TDANet --steps 500 --run runs/try     # a quick look
    python benchmarks/train_demo.py --separator SPMambaOverlapping --start edgesep/demo/spmamba.pth

Everything goes to the run's folder: the speech, the state (the same command continues an interrupted run), the best
checkpoint ``demo.pth`` in the authors' format and ``curve.png`` with loss and SI-SNRi. Sizes and settings stand in
``benchmarks/demos.toml``. Mixtures are made on the fly: two voices of different families, -5 to 5 dB, each resampled
by a random factor, which moves pitch and formants and so makes new voices of the known ones.

For the first ``ordered_steps`` the higher voice belongs on the first output: while a separator cannot separate yet, the
better of two permutations says nothing, and permutation-invariant training stands still at the mixture for thousands of
steps. Then permutation-invariant training begins.

IIANet is shown a synthetic mouth that moves with the first voice, and is asked for that voice alone. Its lip front-end
is trained first, to read the mouth's motion off the crops, and then kept as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import matplotlib
import numpy as np
import soxr
import torch
from torch import Tensor, nn
from tqdm import tqdm

from edgesep import load_separator, separators, training, video
from edgesep.separators import lip

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "calibration"))
import synthesise  # noqa: E402  (the program that made the packaged sets also draws the mouths)


class Speech:
    """Single-voice clips, mixed on the fly."""

    def __init__(self, path: Path):
        data = np.load(path)
        self.clips, self.voice, self.rate = data["clips"], data["voice"], int(data["rate"])
        self.scale = np.float32(data["scale"])
        self.pitch_hz = np.array([pitch_hz(clip, self.rate) for clip in self.clips])

    def source(self, rng: np.random.Generator, clip: int, samples: int, stretch: float) -> np.ndarray:
        x = self.clips[clip].astype(np.float32) * self.scale
        if stretch != 1:
            x = soxr.resample(x, self.rate, self.rate * stretch, quality="LQ")
        start = int(rng.integers(0, max(1, x.size - samples + 1)))
        return np.pad(x[start : start + samples], (0, max(0, samples - x.size + start)))

    def mixtures(
        self, rng: np.random.Generator, batch: int, samples: int, augment: bool, ordered: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(mixture (batch, samples), sources (batch, 2, samples)), if ``ordered`` the higher voice first."""
        out = np.empty((batch, 2, samples), np.float32)
        for b in range(batch):
            first, second = rng.integers(len(self.clips), size=2)
            while self.voice[first] == self.voice[second]:
                second = rng.integers(len(self.clips))
            ratio_db = rng.uniform(-5, 5)
            level = 10 ** (rng.uniform(-30, -20) / 20)
            pitch = np.empty(2)
            for s, (clip, sign) in enumerate(((first, 1), (second, -1))):
                stretch = float(np.exp(rng.uniform(-0.2, 0.2))) if augment else 1.0
                out[b, s] = self.source(rng, clip, samples, stretch) * level * 10 ** (sign * ratio_db / 40)
                pitch[s] = self.pitch_hz[clip] / stretch
            if ordered:
                out[b] = out[b, np.argsort(-pitch)]
        sources = torch.from_numpy(out)
        return sources.sum(1), sources


def pitch_hz(clip: np.ndarray, rate: int) -> float:
    """Median fundamental frequency of one voice: the highest autocorrelation of each 64 ms between 60 and 400 Hz."""
    size = rate * 64 // 1000
    frames = clip[: clip.size // size * size].reshape(-1, size).astype(np.float32)
    spectra = np.abs(np.fft.rfft(frames * np.hanning(size).astype(np.float32), 2 * size)) ** 2
    lags = np.fft.irfft(spectra)[:, rate // 400 : rate // 60]
    loud = lags.max(1) >= np.median(lags.max(1))
    return float(rate / (rate // 400 + np.median(lags[loud].argmax(1))))


def speech(run: Path, split: str, rate: int, utterances: int) -> Speech:
    path = run / f"speech_{split}_{rate}.npz"
    if not path.exists():
        script = HERE.parent / "calibration" / "synthesise.py"
        beside = path.with_name("partial.npz")
        command = [
            sys.executable,
            script,
            "speech",
            "--split",
            split,
            "--rate",
            str(rate),
            "--utterances",
            str(utterances),
        ]
        subprocess.run([*command, "--out", beside], check=True)
        beside.replace(path)
    return Speech(path)


class Mouths:
    """The lip front-end, and the embedding of mouths drawn for a batch of voices."""

    def __init__(self, front_end: separators.Separator):
        self.front_end = front_end

    def crops(self, rng: np.random.Generator, voices: Tensor, rate: int) -> tuple[Tensor, Tensor]:
        """``(batch, samples)`` → crops ``(batch, 1, frames, 88, 88)`` and their motion ``(batch, frames, 2)``."""
        motion = [synthesise.mouth_motion(voice.numpy(), rate) for voice in voices]
        drawn = [video.crops(synthesise.mouth_video(rng, m, noise=0.02)) for m in motion]
        return torch.from_numpy(np.stack(drawn)), torch.from_numpy(np.stack(motion))

    def embedding(self, rng: np.random.Generator, voices: Tensor, rate: int) -> Tensor:
        with torch.no_grad():
            embedded: Tensor = self.front_end.module(self.crops(rng, voices, rate)[0])
        return embedded

    def learn(self, voices: Callable[[int], Tensor], rate: int, steps: int) -> float:
        """Train the front-end to tell the motion through one linear layer; returns the last mean squared error."""
        module = self.front_end.module.train()
        reader = nn.Conv1d(self.front_end.outputs[0].shape[1], 2, 1)
        optimizer = torch.optim.AdamW([*module.parameters(), *reader.parameters()], lr=3e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        for step in range(steps):
            crops, motion = self.crops(np.random.default_rng([1, step]), voices(step), rate)
            error = (reader(module(crops)) - motion.transpose(1, 2)).square().mean()
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
            schedule.step()
        module.eval().requires_grad_(False)
        return float(error)


def front_end_of(run: Path, config: dict[str, int], voices: Callable[[int], Tensor], rate: int) -> Mouths:
    """The run's trained lip front-end; trained now if it is not there yet."""
    path = run / "front_end.pth"
    mouths = Mouths(lip.create(config, 0))
    if path.exists():
        mouths.front_end.module.load_state_dict(torch.load(path, weights_only=True))
        mouths.front_end.module.eval().requires_grad_(False)
    else:
        error = mouths.learn(voices, rate, 300)
        tqdm.write(
            f"lip front-end: {mouths.front_end.parameters:,} parameters, motion read with an error of {error:.4f}"
        )
        torch.save(mouths.front_end.module.state_dict(), path)
    return mouths


def overlapping(start: separators.Separator, config: dict[str, int], module_of: ModuleType) -> separators.Separator:
    """A separator whose windows overlap, from one whose windows do not: a bin is the sum of more of them."""
    made: separators.Separator = module_of.create(config, start.sample_rate_hz)
    more = start.config["emb_hs"] / config["emb_hs"]
    state = start.module.state_dict()
    summed = [name for name in state if name.endswith(("intra_linear.weight", "inter_linear.weight"))]
    made.module.load_state_dict(state | {name: state[name] / more for name in summed})
    return made


def draw(curve: tuple[tuple[int, float, float], ...], title: str, out: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps, losses, scores = zip(*curve, strict=True)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    left.plot(steps, losses)
    left.set(xlabel="step", ylabel="training loss (dB)")
    right.plot(steps, scores, color="tab:green")
    right.set(xlabel="step", ylabel="SI-SNRi, validation voices (dB)")
    figure.suptitle(title)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    demos = tomllib.loads((HERE / "demos.toml").read_text())
    parser.add_argument("--separator", choices=sorted(demos), default="TDANet")
    parser.add_argument("--run", type=Path, help="folder of the run (default: runs/NAME)")
    parser.add_argument("--start", type=Path, help="begin from this checkpoint's weights (default: random)")
    parser.add_argument("--steps", type=int, help="default: as in demos.toml")
    parser.add_argument("--lr", type=float, help="default: as in demos.toml")
    parser.add_argument("--seconds", type=float, help="length of the training mixtures (default: as in demos.toml)")
    parser.add_argument("--iterations", type=int, help="with --start: another number of iterations (num_blocks)")
    parser.add_argument("--ordered-steps", type=int, help="first steps without permutations (default: demos.toml)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    demo = demos[args.separator]
    run: Path = args.run or Path("runs") / args.separator
    run.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(demo["seed"])
    rate = demo["sample_rate"]
    samples = int((args.seconds or demo["seconds"]) * rate)
    steps = args.steps or demo["steps"]

    train = speech(run, "train", rate, demo["utterances"])
    heldout = speech(run, "valid", rate, 300)
    test_mixture, test_sources = heldout.mixtures(np.random.default_rng(1), 128, 3 * rate, augment=False)
    kind = demo.get("separator", args.separator)
    module_of = next(m for m in separators.separator_modules() if kind in m.NAMES)
    if args.start:
        separator = load_separator(args.start)
        if separator.config.get("emb_hs") != demo["config"].get("emb_hs"):
            separator = overlapping(separator, demo["config"], module_of)
        if args.iterations:  # iterations share their weights, so any number fits
            separator.config["num_blocks"] = separator.module.sm.iterations = args.iterations
    else:
        separator = module_of.create(demo["config"], rate)
    module = separator.module.to(memory_format=torch.channels_last)

    mouths = None
    if "front_end" in demo:

        def voices(step: int) -> Tensor:
            rng = np.random.default_rng([demo["seed"], 1, step])
            return train.mixtures(rng, demo["batch"], samples, augment=True)[1][:, 0]

        mouths = front_end_of(run, demo["front_end"], voices, rate)

    def seen(rng: np.random.Generator, mixture: Tensor, sources: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """What the separator is given and asked for."""
        if mouths is None:
            return (mixture,), sources
        return (mixture, mouths.embedding(rng, sources[:, 0], rate)), sources[:, :1]

    ordered = demo.get("ordered_steps", 0) if args.ordered_steps is None else args.ordered_steps
    now = 0

    def batches(step: int) -> tuple[tuple[Tensor, ...], Tensor]:
        nonlocal now
        now = step
        rng = np.random.default_rng([demo["seed"], step])
        return seen(rng, *train.mixtures(rng, demo["batch"], samples, augment=True, ordered=step < ordered))

    def loss(mixture: Tensor, estimates: Tensor, references: Tensor) -> Tensor:
        return (training.snr_loss if now < ordered else training.pit_snr_loss)(mixture, estimates, references)

    def validate(module: nn.Module) -> float:
        gained = []
        for m, s in zip(test_mixture.split(8), test_sources.split(8), strict=True):
            inputs, wanted = seen(np.random.default_rng(2), m, s)
            before = training.si_snr_db(m[:, None].expand_as(wanted), wanted).mean(1)
            gained.append(training.pit_db(module(*inputs), wanted, training.si_snr_db) - before)
        return float(torch.cat(gained).mean())

    started = time.time()
    bar = tqdm(total=steps, desc=args.separator, unit="step", mininterval=5 if sys.stderr.isatty() else 60)

    def on_step(step: int, _: float) -> None:
        bar.update(step - bar.n)

    def on_validation(progress: training.Progress, module: nn.Module) -> None:
        step, loss, score = progress.curve[-1]
        tqdm.write(f"step {step:6d}  loss {loss:7.2f} dB  SI-SNRi {score:6.2f} dB  {time.time() - started:6.0f} s")
        draw(progress.curve, f"{args.separator}: {separator.parameters:,} parameters, {rate} Hz", run / "curve.png")
        if score == progress.best_db:
            conf = {
                "audionet": {"audionet_name": separator.name, "audionet_config": separator.config},
                "datamodule": {"data_config": {"sample_rate": rate}},
            }
            state = {k: v.contiguous() for k, v in module_of.to_authors(module).items()}
            if mouths is not None:  # one file for both graphs, as Lightning would write it
                state = {f"audio_model.{k}": v for k, v in state.items()}
                state |= {f"video_model.{k}": v for k, v in mouths.front_end.module.state_dict().items()}
            torch.save({"model_name": separator.name, "state_dict": state, "conf": conf}, run / "demo.pth")
            (run / "demo.json").write_text(json.dumps({"step": step, "valid_si_snri_db": score, **demo}, indent=1))

    training.fit(
        module,
        batches,
        steps,
        validate,
        loss=loss,
        lr=args.lr or demo["lr"],
        every=demo["validate_every"],
        state_path=run / "state.pt",
        on_step=on_step,
        on_validation=on_validation,
    )


if __name__ == "__main__":
    main()
