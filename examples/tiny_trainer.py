"""A trainer small enough to read, which stands in for sleap-nn.

It learns where a bright dot lies in a small noisy picture: a linear model, fitted with
stochastic gradient descent. The pictures are made up, from a seed that is the hash of
the labels or the video; so it takes every package that sleap-nn takes, needs nothing
but Python, and still learns something. It accepts the command lines of sleap-nn::

    tiny_trainer.py train --config-name X.yaml --config-dir . trainer_config.run_name=R
    tiny_trainer.py track --data_path V.mp4 --model_paths models/R -o OUT.slp
    tiny_trainer.py --install DIR      # puts it into DIR under the name sleap-nn
"""

import argparse
import csv
import hashlib
import io
import json
import math
import os
import random
import re
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

SIDE = 8
"""Pixels in a row of a picture, and rows in it."""

LEARNING_RATE = 0.02
TRAINING_PICTURES = 80
VALIDATION_PICTURES = 20

Point = tuple[float, float]
Picture = list[float]


class Model:
    """A weight for every pixel and a bias, for x and for y."""

    def __init__(self, weights: list[list[float]] | None = None) -> None:
        self.weights = weights or [[0.0] * (SIDE * SIDE + 1) for _ in range(2)]

    def predict(self, picture: Picture) -> Point:
        """Return the position of the dot, in pixels from the top left."""
        x, y = (
            sum(w * p for w, p in zip(row, [*picture, 1.0], strict=True))
            for row in self.weights
        )
        return x, y

    def learn(self, picture: Picture, truth: Point) -> float:
        """Do one step of gradient descent; return the loss before it."""
        errors = [p - t for p, t in zip(self.predict(picture), truth, strict=True)]
        for row, error in zip(self.weights, errors, strict=True):
            for index, pixel in enumerate([*picture, 1.0]):
                row[index] -= LEARNING_RATE * error * pixel
        return sum(error * error for error in errors) / 2

    def loss(self, pictures: Sequence[tuple[Picture, Point]]) -> float:
        """Return the mean squared error over pictures, in square pixels."""
        total = 0.0
        for picture, truth in pictures:
            total += math.dist(self.predict(picture), truth) ** 2 / 2
        return total / len(pictures)


def draw(rng: random.Random) -> tuple[Picture, Point]:
    """Make a picture up; return it and where its dot is."""
    x, y = rng.uniform(1, SIDE - 2), rng.uniform(1, SIDE - 2)
    picture = [
        math.exp(-((column - x) ** 2 + (row - y) ** 2) / 2) + rng.gauss(0, 0.02)
        for row in range(SIDE)
        for column in range(SIDE)
    ]
    return picture, (x, y)


def say(text: str) -> None:
    """Print a line with the time in front."""
    print(f"{datetime.now():%Y-%m-%d %H:%M:%S} | {text}", flush=True)


def seed_of(path: Path) -> str:
    """Turn a file of any kind into a seed."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------- training


def train(config_file: Path, overrides: dict[str, str]) -> None:
    """Train by a configuration of sleap-nn, as far as it applies here."""
    config = config_file.read_text()
    epochs = int(setting(config, overrides, "max_epochs", "10"))
    steps = int(setting(config, overrides, "train_steps_per_epoch", "20"))
    labels = Path(first_labels(config, config_file))
    folder = Path(setting(config, overrides, "ckpt_dir", "models"))
    run = folder / setting(config, overrides, "run_name", "tiny_run")
    run.mkdir(parents=True, exist_ok=True)
    for name in ("initial_config.yaml", "training_config.yaml"):
        (run / name).write_text(config)

    say(f"Started training of {run} with {labels}")
    fit(random.Random(seed_of(labels)), epochs, steps, run)
    say(f"Finished training: {run / 'best.ckpt'}")


def fit(rng: random.Random, epochs: int, steps: int, run: Path) -> None:
    """Fit a model; keep its best state and the course of its loss in the run folder."""
    training = [draw(rng) for _ in range(TRAINING_PICTURES)]
    validation = [draw(rng) for _ in range(VALIDATION_PICTURES)]
    model = Model()
    best = math.inf
    with (run / "training_log.csv").open("w", newline="") as file:
        log = csv.writer(file)
        log.writerow(["epoch", "train/loss", "val/loss", "learning_rate"])
        for epoch in range(epochs):
            loss = 0.0
            for step in range(1, steps + 1):
                batch = rng.sample(training, 4)
                loss += sum(model.learn(*example) for example in batch) / len(batch)
                draw_bar(epoch, step, steps, f"loss={loss / step:.4f}")
            current = model.loss(validation)
            draw_bar(
                epoch, steps, steps, f"loss={loss / steps:.4f}, val/loss={current:.4f}"
            )
            print(flush=True)
            log.writerow(
                [epoch, f"{loss / steps:.6f}", f"{current:.6f}", LEARNING_RATE]
            )
            file.flush()
            if current < best:
                best = current
                save(model, run / "best.ckpt")


def draw_bar(epoch: int, step: int, steps: int, values: str) -> None:
    """Draw a progress bar over the one before."""
    blocks = "█" * (10 * step // steps)
    percent = 100 * step // steps
    print(
        f"\rEpoch {epoch}: {percent:3}%|{blocks:10}| {step}/{steps} [{values}]",
        end="",
        flush=True,
    )


def save(model: Model, path: Path) -> None:
    """Write a model as a whole; a reader never sees half of it."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"trainer": "tiny", "weights": model.weights}))
    part.replace(path)


def setting(config: str, overrides: dict[str, str], name: str, default: str) -> str:
    """Look a setting of the trainer up: overrides first, then the configuration."""
    override = overrides.get(f"trainer_config.{name}")
    if override is not None:
        return override
    found = re.search(rf"^ +{name}: *(\S+) *$", config, re.MULTILINE)
    return default if found is None or found[1] == "null" else found[1]


def first_labels(config: str, config_file: Path) -> str:
    """Return the first labels file that a configuration names."""
    found = re.search(r"train_labels_path:\s*-\s*(.+)", config)
    if found is None:
        raise SystemExit(f"{config_file} names no train_labels_path")
    return found[1].strip().strip("'\"")


# ------------------------------------------------------------------------- tracking


def track(video: Path, model_folder: Path, output: Path, frames: str) -> None:
    """Predict the position of the dot in each frame of a video; write a file."""
    say(f"Started inference on {video} with {model_folder}")
    model = load(model_folder / "best.ckpt")
    rng = random.Random(seed_of(video))
    numbers = frame_numbers(frames)
    predictions = []
    total = 0.0
    for number in numbers:
        picture, truth = draw(rng)
        x, y = model.predict(picture)
        error = math.dist((x, y), truth)
        total += error
        predictions.append({"frame": number, "x": x, "y": y, "error": error})
    mean = total / len(predictions)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"mean_error": mean, "predictions": predictions}))
    say(f"Predicted {len(predictions)} frames, mean error {mean:.3f} pixels")
    say(f"Predictions output path: {output}")


def load(path: Path) -> Model:
    """Read a model of this trainer; for one of sleap-nn, fit one as a stand-in."""
    try:
        return Model(json.loads(path.read_bytes())["weights"])
    except ValueError:
        say(f"{path} was made by another trainer: fitting a model instead")
    rng = random.Random(seed_of(path))
    model = Model()
    for _ in range(2000):
        model.learn(*draw(rng))
    return model


def frame_numbers(frames: str) -> list[int]:
    """Parse the value of ``--frames``, such as ``0-29`` or ``0,5,7``."""
    numbers: list[int] = []
    for part in frames.split(","):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


# --------------------------------------------------------------------- command line


def install(folder: Path) -> None:
    """Write a program named sleap-nn that runs this file with this Python."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(Path(__file__).resolve())]
    if os.name == "nt":
        program = folder / "sleap-nn.cmd"
        program.write_text(f'@"{command[0]}" "{command[1]}" %*\n')
    else:
        program = folder / "sleap-nn"
        program.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
        program.chmod(0o755)
    print(program)


def parse_overrides(words: Sequence[str]) -> dict[str, str]:
    """Read ``name=value`` words, in which a value may stand in double quotes."""
    pairs = (word.partition("=") for word in words if not word.startswith("-"))
    return {name: value.strip("\"'") for name, _, value in pairs}


def main() -> None:
    """Run the command line."""
    # Windows would encode the blocks of the bar by its code page.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    parser = argparse.ArgumentParser(description="A stand-in for sleap-nn.")
    parser.add_argument("--install", type=Path, metavar="DIR")
    commands = parser.add_subparsers(dest="command")
    training = commands.add_parser("train")
    training.add_argument("--config-name", required=True)
    training.add_argument("--config-dir", type=Path, default=Path())
    for name in ("track", "predict"):
        tracking = commands.add_parser(name)
        tracking.add_argument("--data_path", type=Path, required=True)
        tracking.add_argument("--model_paths", type=Path, required=True)
        tracking.add_argument("-o", "--output_path", type=Path, required=True)
        tracking.add_argument("--frames", default="0-39")
    arguments, others = parser.parse_known_args()
    try:
        if arguments.install is not None:
            install(arguments.install)
        elif arguments.command == "train":
            config = arguments.config_dir / arguments.config_name
            train(config, parse_overrides(others))
        elif arguments.command is not None:
            track(
                arguments.data_path,
                arguments.model_paths,
                arguments.output_path,
                arguments.frames,
            )
        else:
            parser.error("nothing to do")
    except OSError as error:
        raise SystemExit(f"Error: {error}") from None


if __name__ == "__main__":
    main()
