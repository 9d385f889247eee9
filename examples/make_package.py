"""Make a training package of any size, to try sleap-rtc with.

    python examples/make_package.py job.zip --megabytes 500 --epochs 20

The labels in it are random bytes, which `tiny_trainer.py` takes and sleap-nn refuses.
"""

import argparse
import os
import shlex
import zipfile
from pathlib import Path

CONFIG = """\
data_config:
  train_labels_path:
  - labels.pkg.slp
trainer_config:
  max_epochs: {epochs}
  train_steps_per_epoch: 20
  ckpt_dir: models
  run_name: tiny_run
"""

MEGABYTE = 1024 * 1024


def make_package(path: Path, *, megabytes: int, epochs: int) -> None:
    """Write a package that is laid out as SLEAP exports it.

    Args:
        path: The zip file to write.
        megabytes: Size of the labels, which do not compress.
        epochs: Length of the training.
    """
    command = ["sleap-nn", "train", "--config-name", "single_instance.yaml"]
    command += ["--config-dir", ".", 'trainer_config.ckpt_dir="models"']
    with zipfile.ZipFile(path, "w") as package:
        package.writestr("single_instance.yaml", CONFIG.format(epochs=epochs))
        package.writestr("train-script.sh", f"#!/bin/bash\n{shlex.join(command)}\n")
        with package.open("labels.pkg.slp", "w", force_zip64=True) as labels:
            for _ in range(megabytes):
                labels.write(os.urandom(MEGABYTE))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Make a training package.")
    parser.add_argument("package", type=Path, help="the zip file to write")
    parser.add_argument("--megabytes", type=int, default=1, help="its size")
    parser.add_argument("--epochs", type=int, default=10, help="how long it trains")
    arguments = parser.parse_args()
    make_package(
        arguments.package, megabytes=arguments.megabytes, epochs=arguments.epochs
    )


if __name__ == "__main__":
    main()
