"""Make the packaged mixture sets and the training speech with espeak-ng.

    python calibration/synthesise.py sets              # calibration/calibration and calibration/test, as shipped
    python calibration/synthesise.py mouths            # the mouth videos of these sets alone
    python calibration/synthesise.py train --mixtures 800 --out runs/train    # a set of training voices, for recovery
    python calibration/synthesise.py speech --split train --utterances 9000 --out speech_train.npz

Needs espeak-ng (Debian: apt install espeak-ng), numpy, scipy, soundfile and soxr. Voices are espeak-ng's voice
variants. Variants that differ only by a number (iven, iven2, ...) are one family, and a family belongs to one split
only, so that test voices are unseen in training and calibration. Everything follows from the seed.
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
import soxr

HERE = Path(__file__).parent
SEED = 2024
#: Left out: whispers have no voicing at all, "fast" is a speed setting, "announcer" plays a jingle.
EXCLUDED = {"whisper", "whisperf", "fast", "announcer"}
LANGUAGES = ("en-us", "en-gb", "de", "fr-fr", "es", "it", "pt-br", "nl", "pl", "sv", "fi", "cs", "tr", "ro", "hu", "id")
WORDS = """
able about above accept across action afternoon again agree almost along always among animal answer apple around
arrive autumn average balance basket beautiful because become before behind believe below bicycle birthday blanket
blossom bottle bridge bright bring brother build button candle captain careful carry castle catch ceiling certain
change children choose circle clever climb cloudy coffee collect colour common company copper corner cotton country
cousin cover create curious curtain damage dance danger daughter deliver desert different dinner discover distance
doctor double dream during early easily electric eleven empty engine enough evening every exactly example factory
family famous farmer father feather fellow festival field finger finish flower follow foreign forest forget forward
freedom friend garden gather gentle giant glass golden grandmother ground guitar hammer happen harbour healthy heavy
helpful history holiday honest hospital hungry imagine important inside island jacket journey kitchen knowledge
ladder language laughter leather lesson letter library listen little lonely machine manage market matter meadow
measure medicine member message middle million minute mirror moment morning mountain music narrow nation nature
necessary needle neighbour never number ocean offer office orange ordinary other painter paper parent patient pepper
perhaps picture pillow planet pleasant pocket police popular potato practice present promise proud purple question
quickly quiet rabbit railway rather reason remember repair return river rocket rubber sailor salad school season
second secret seldom seven shadow shallow shelter shoulder silver simple sister sleepy smooth soldier special spider
spring square station story strange stream student sudden sugar summer supper surface table teacher temple theatre
thirsty thousand thunder ticket together tomorrow travel trouble turtle twenty umbrella uncle under useful valley
vegetable village violin visitor voyage waiter wander water weather welcome whistle window winter without wonderful
wooden worker yellow yesterday young
""".split()  # noqa: SIM905 (a list of 300 quoted words is unreadable)


def families() -> dict[str, list[str]]:
    """Voice variants of the installed espeak-ng by family (numbers stripped), sorted."""
    if shutil.which("espeak-ng") is None:
        sys.exit("espeak-ng is not installed; install it (Debian: apt install espeak-ng)")
    listing = subprocess.run(["espeak-ng", "--voices=variant"], capture_output=True, text=True, check=True).stdout
    found: dict[str, list[str]] = {}
    for name in sorted(set(re.findall(r"!v/(\S+)", listing)) - EXCLUDED):
        stem = re.sub(r"\d+$", "", name).lower()
        stem = {"m": "male", "f": "female", "anikarobot": "anika", "anxiousandy": "andy"}.get(stem, stem)
        # The plain male/female variants differ by number alone, yet each is a voice of its own.
        found.setdefault(name if stem in ("male", "female") else stem, []).append(name)
    return found


def voices(split: str) -> list[list[str]]:
    """Families of one split: 20 % for test, 10 % calibration, 10 % valid, the rest train.

    A family is drawn first and a voice of it second, so that large families do not crowd out the others.
    """
    names = sorted(families())
    order = np.random.default_rng(SEED).permutation(len(names))
    bounds = {"test": (0.0, 0.2), "calibration": (0.2, 0.3), "valid": (0.3, 0.4), "train": (0.4, 1.0)}[split]
    lo, hi = (round(b * len(names)) for b in bounds)
    return [families()[names[i]] for i in sorted(order[lo:hi])]


def speak(rng: np.random.Generator, voice: str, rate: int, seconds: float) -> np.ndarray:
    """One utterance of at least ``seconds``, float32 at ``rate`` Hz, active level 1 (RMS), edges trimmed."""
    text = ". ".join(
        " ".join(rng.choice(WORDS, size=int(rng.integers(4, 9)))) for _ in range(int(np.ceil(seconds / 1.8)) + 1)
    )
    language = rng.choice(LANGUAGES)
    args = ["-v", f"{language}+{voice}", "-p", str(rng.integers(25, 76)), "-s", str(rng.integers(140, 191))]
    wav = subprocess.run(["espeak-ng", *args, "--stdout", text], capture_output=True, check=True).stdout
    # espeak-ng streams a header with an unknown length; everything behind 44 bytes is 16-bit PCM.
    source_rate = int.from_bytes(wav[24:28], "little")
    x = np.frombuffer(wav[44 : 44 + (len(wav) - 44) // 2 * 2], "<i2").astype(np.float32) / 32768
    x = soxr.resample(x, source_rate, rate)
    loud = np.flatnonzero(np.abs(x) > 0.01 * np.abs(x).max())
    x = x[loud[0] : loud[-1] + 1]
    frame = x[: x.size // 160 * 160].reshape(-1, 160)
    power = (frame**2).mean(1)
    active = power[power > 0.01 * power.mean()].mean()
    return np.asarray(x / np.sqrt(active), np.float32)


VIDEO_FPS, CROP = 25, 88


def mouth_motion(source: np.ndarray, rate: int) -> np.ndarray:
    """How a mouth would move with this speech: (frames, 2), opening and spread, 0 to 1.

    The opening follows the level of each 40 ms, the spread its zero crossings (s and f are said with spread lips).
    """
    hop = rate // VIDEO_FPS
    x = np.pad(source, (0, -source.size % hop)).reshape(-1, hop)
    level = 10 * np.log10((x**2).mean(1) + 1e-10)
    spread = np.clip((np.diff(np.signbit(x), axis=1) != 0).mean(1) / 0.4, 0, 1)
    opening = np.clip((level - np.percentile(level, 95) + 30) / 30, 0, 1) * (1 - 0.5 * spread)
    moves = np.stack([opening, spread * (opening > 0.05)], 1)
    near = np.pad(moves, ((1, 1), (0, 0)), mode="edge")  # lips do not jump
    return np.asarray(0.25 * near[:-2] + 0.5 * near[1:-1] + 0.25 * near[2:], np.float32)


def mouth_video(rng: np.random.Generator, motion: np.ndarray, noise: float = 0.0) -> np.ndarray:
    """Grey mouth crops (frames, 88, 88) uint8 of one random face that makes this motion."""
    opening, spread = motion.T.astype(np.float32)[:, :, None, None]
    frames = len(motion)
    sway = np.cumsum(rng.normal(0, 0.15, (2, frames)), 1).astype(np.float32)
    middle = np.array([[44.0], [46.0]], np.float32) + rng.normal(0, 2.5, (2, 1)).astype(np.float32) + sway
    half_width, lip = rng.uniform(18, 26), rng.uniform(3, 6)
    skin, red, dark = rng.uniform(0.45, 0.7), rng.uniform(0.25, 0.42), rng.uniform(0.03, 0.15)
    grid = np.arange(CROP, dtype=np.float32)
    dx, dy = grid[None, None, :] - middle[0][:, None, None], grid[None, :, None] - middle[1][:, None, None]

    def inside(wide: np.ndarray, high: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(np.clip(12 * ((dx / wide) ** 2 + (dy / high) ** 2 - 1), -30, 30)))

    wide = half_width * (0.8 + 0.25 * spread - 0.1 * opening)
    high = 0.8 + 14 * opening
    face = skin + (red - skin) * inside(wide + lip, high + lip) + (dark - red) * inside(wide, high)
    if noise:
        face += rng.normal(0, noise, face.shape).astype(np.float32)
    return np.asarray(np.clip(face * 255, 0, 255), np.uint8)


def speech(split: str, utterances: int, rate: int, seconds: float, out: Path) -> None:
    """Write clips of one length as int16 with the index of their voice family."""
    names = voices(split)

    def one(i: int) -> tuple[np.ndarray, int]:
        rng = np.random.default_rng([SEED, i, {"train": 0, "valid": 1}[split]])
        who = int(rng.integers(len(names)))
        x = speak(rng, rng.choice(names[who]), rate, seconds)
        n = int(seconds * rate)
        x = np.pad(x, (0, max(0, n - x.size)))[:n]
        return np.round(x / 16 * 32767).clip(-32767, 32767).astype(np.int16), who

    with ThreadPoolExecutor(2) as pool:
        done = []
        for i, item in enumerate(pool.map(one, range(utterances))):
            done.append(item)
            if i % 500 == 499:
                print(f"{i + 1}/{utterances}", flush=True)
    clips = np.stack([c for c, _ in done])
    np.savez(out, clips=clips, voice=np.array([w for _, w in done]), rate=rate, scale=16 / 32767)


def mixture_set(root: Path, split: str, mixtures: int, rate: int, seconds: float) -> None:
    """Write one set in the LibriMix layout: mix_clean/, s1/, s2/ with the same file names."""
    rng = np.random.default_rng([SEED, {"calibration": 10, "test": 11, "train": 12}[split]])
    names, n = voices(split), int(seconds * rate)
    for d in ("mix_clean", "s1", "s2"):
        shutil.rmtree(root / d, ignore_errors=True)
        (root / d).mkdir(parents=True)
    for i in range(mixtures):
        a, b = (rng.choice(names[j]) for j in rng.choice(len(names), 2, replace=False))
        ratio_db = rng.uniform(-5, 5)
        pair = [speak(rng, v, rate, seconds)[:n] for v in (a, b)]
        pair = [np.pad(x, (0, n - x.size)) for x in pair]
        pair = [pair[0] * 10 ** (ratio_db / 40), pair[1] * 10 ** (-ratio_db / 40)]
        level = 10 ** (rng.uniform(-30, -20) / 20)
        level = min(level, 0.9 / max(np.abs(x).max() for x in [*pair, pair[0] + pair[1]]))
        # References are rounded first, so that the stored mixture is exactly their sum.
        pair = [np.round(x * level * 32767) / 32768 for x in pair]
        name = f"{i:03d}_{a}_{b}_{ratio_db:+.1f}dB.flac"
        for d, x in (("mix_clean", pair[0] + pair[1]), ("s1", pair[0]), ("s2", pair[1])):
            data = io.BytesIO()
            soundfile.write(data, x, rate, format="FLAC", subtype="PCM_16")
            (root / d / name).write_bytes(data.getvalue())
    mouths(root, rate)
    size = sum(f.stat().st_size for f in root.rglob("*") if f.is_file())
    print(f"{root.name}: {mixtures} mixtures of {seconds} s, {len(names)} voice families, {size / 1e6:.2f} MB")


def mouths(root: Path, rate: int) -> None:
    """Draw the mouth of the first source of each mixture: mouth/NAME.npz, array ``data``."""
    shutil.rmtree(root / "mouth", ignore_errors=True)
    (root / "mouth").mkdir()
    for i, file in enumerate(sorted((root / "s1").iterdir())):
        source, _ = soundfile.read(file, dtype="float32")
        drawn = mouth_video(np.random.default_rng([SEED, i]), mouth_motion(source, rate))
        # Few grey levels compress well; the front-end reads the motion all the same.
        np.savez_compressed(root / "mouth" / f"{file.stem}.npz", data=(drawn // 16) * 16 + 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = parser.add_subparsers(dest="what", required=True)
    sets = sub.add_parser("sets", help="the packaged calibration and test sets")
    sets.add_argument("--rate", type=int, default=8000)
    drawn = sub.add_parser("mouths", help="the mouth videos of the packaged sets alone")
    drawn.add_argument("--rate", type=int, default=8000)
    more = sub.add_parser("train", help="a mixture set of the training voices")
    more.add_argument("--rate", type=int, default=8000)
    more.add_argument("--mixtures", type=int, default=800)
    more.add_argument("--out", type=Path, required=True)
    one = sub.add_parser("speech", help="single-voice clips for training")
    one.add_argument("--split", choices=("train", "valid"), default="train")
    one.add_argument("--utterances", type=int, default=9000)
    one.add_argument("--seconds", type=float, default=4.0)
    one.add_argument("--rate", type=int, default=8000)
    one.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.what == "sets":
        mixture_set(HERE / "calibration", "calibration", 48, args.rate, 3.0)
        mixture_set(HERE / "test", "test", 40, args.rate, 3.0)
    elif args.what == "train":
        mixture_set(args.out, "train", args.mixtures, args.rate, 3.0)
    elif args.what == "mouths":
        mouths(HERE / "calibration", args.rate)
        mouths(HERE / "test", args.rate)
    else:
        speech(args.split, args.utterances, args.rate, args.seconds, args.out)


if __name__ == "__main__":
    main()
