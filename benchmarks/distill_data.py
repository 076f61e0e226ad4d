"""Teach a small student on few labelled images: every method beside plain answers and beside the labels alone.

python benchmarks/distill_data.py                      digits, 3 seeds; print
python benchmarks/distill_data.py --write              and write benchmarks/distill_data.md
python benchmarks/distill_data.py --only rkd,crd --seeds 1 --steps 50     a quick look
python benchmarks/distill_data.py --set fashion        Fashion-MNIST of LFM_ASSETS, a teacher that is trained first
"""

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import lfm
from lfm.method import methods_of
from lfm.recipe.step import Settings

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "benchmarks" / "distill_data.md"
NETS = f"{Path(__file__)}"
QUIET = Settings(quiet=True, threads=1)
METHODS = (
    *("response", "dkd", "fitnets", "attention_transfer", "simkd", "rkd", "similarity", "affinity", "crd"),
    *("mutual", "born_again", "g2sd"),
)
RATE = 5e-3
BATCH = 50


class Reader(nn.Module):
    """Three convolutions with batch norms, and an output layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = (width, width * 2, width * 2)
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1, stride=stride, bias=False)
            for before, after, stride in zip((1, *sizes[:-1]), sizes, (1, 2, 2), strict=True)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(size) for size in sizes)
        self.head = nn.Linear(sizes[-1], 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        return self.head(x.mean((2, 3)))


def large() -> nn.Module:
    return Reader(24)


def small() -> nn.Module:
    return Reader(12)


@dataclass(frozen=True)
class Images:
    """A data set: uint8 images (n, height, width) and labels, to train on and to test on."""

    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]

    @property
    def spec(self) -> dict:
        """How a model takes them."""
        pixels = self.train[0] / 255
        return {
            "size": pixels.shape[-1],
            "channels": 1,
            "mean": [round(float(pixels.mean()), 4)],
            "std": [round(float(pixels.std()), 4)],
        }

    def inputs(self, images: np.ndarray) -> torch.Tensor:
        spec = self.spec
        return (torch.tensor(images / 255, dtype=torch.float32)[:, None] - spec["mean"][0]) / spec["std"][0]

    def accuracy(self, module: nn.Module) -> float:
        """Return the share of test images that are read right, in percent."""
        with torch.no_grad():
            found = torch.cat([module.eval()(part).argmax(-1) for part in self.inputs(self.test[0]).split(500)])
        return 100 * float((found == torch.tensor(self.test[1])).float().mean())


def digits() -> Images:
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    pixels, labels = np.round(found.images[order] / 16 * 255).astype(np.uint8), found.target[order]
    return Images((pixels[360:], labels[360:]), (pixels[:360], labels[:360]))


def fashion() -> Images:
    found = np.load(Path(os.environ["LFM_ASSETS"]) / "data" / "fashion-mnist.npz")
    return Images((found["x_train"], found["y_train"].astype(int)), (found["x_test"], found["y_test"].astype(int)))


def teacher(images: Images, seed: int, steps: int, folder: Path) -> tuple[Path, float]:
    """Train a large model on all training images; return its folder and its accuracy."""
    torch.manual_seed(seed)
    module, pixels, labels = large(), images.inputs(images.train[0]), torch.tensor(images.train[1])
    optimiser = torch.optim.Adam(module.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        batch = torch.randint(len(labels), (64,))
        shift = torch.randint(-1, 2, (2,)).tolist()
        F.cross_entropy(module(pixels[batch].roll(shift, (2, 3))), labels[batch]).backward()
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
    folder.mkdir(parents=True)
    save_file(module.state_dict(), folder / "model.safetensors")
    return folder, images.accuracy(module)


def taught(name: str, steps: int, seed: int, images: Images, known: Path, data: Path, out: Path) -> tuple[float, float]:
    """Teach a new student; return its accuracy and the process seconds that it took."""
    method = "response" if name == "labels alone" else name
    given = {"steps": steps // 2 if name == "born_again" else steps, "batch_size": BATCH, "learning_rate": RATE}
    given |= {"alpha": 0.0} if name == "labels alone" else {}
    teaching = {"ref": str(known), "module": f"{NETS}:large", "image": images.spec}
    if name == "mutual":
        teaching = {"module": f"{NETS}:large", "image": images.spec}
    new = {"module": f"{NETS}:small", "image": images.spec}
    began = time.process_time()
    made = methods_of("distill")[method].load()(**given)
    lfm.distill(made, teaching, new, data={"path": str(data)}, out=out, seed=seed, settings=QUIET)
    seconds = time.process_time() - began
    student = small()
    student.load_state_dict(load_file(out / "model.safetensors"))
    return images.accuracy(student), seconds


def measure(arguments: argparse.Namespace, work: Path) -> list[str]:
    """Run everything; return the lines of the table."""
    images = {"digits": digits, "fashion": fashion}[arguments.set]()
    found: dict[str, list[tuple[float, float]]] = {}
    teachers = []
    for seed in range(arguments.seeds):
        known, right = teacher(images, seed, arguments.teacher_steps, work / f"teacher{seed}")
        teachers.append(right)
        some = np.random.default_rng(seed).permutation(len(images.train[1]))[: arguments.labelled]
        data = work / f"train{seed}.npz"
        np.savez(data, x_train=images.train[0][some], y_train=images.train[1][some])
        for name in ["labels alone", *(arguments.only or METHODS)]:
            out = work / f"{name.replace(' ', '-')}-{seed}"
            found.setdefault(name, []).append(taught(name, arguments.steps, seed, images, known, data, out))
            print(f"seed {seed}  {name:20} {found[name][-1][0]:5.1f} %  {found[name][-1][1]:4.1f} s", flush=True)
    lines = [
        f"{arguments.set}: {arguments.labelled} labelled images, {arguments.steps} steps of {BATCH}, "
        f"teacher {spread(teachers)} % (trained on all {len(images.train[1]):,}), test images {len(images.test[1]):,}",
        "",
        "| method | accuracy, % | each seed | against labels alone | against answers alone | process s |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in found.items():
        right = [accuracy for accuracy, _ in runs]
        bases = [found.get(base, runs) for base in ("labels alone", "response")]
        beside = [gain(right, [one for one, _ in base]) for base in bases]
        each = ", ".join(f"{one:.1f}" for one in right)
        seconds = statistics.mean(took for _, took in runs)
        lines.append(f"| {name} | {spread(right)} | {each} | {' | '.join(beside)} | {seconds:.1f} |")
    return lines


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.pstdev(values):.1f}"


def gain(values: list[float], base: list[float]) -> str:
    return f"{statistics.mean(one - other for one, other in zip(values, base, strict=True)):+.1f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=["digits", "fashion"], default="digits")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--labelled", type=int, default=100)
    parser.add_argument("--teacher-steps", type=int, default=600)
    parser.add_argument("--only", type=lambda text: text.split(","))
    parser.add_argument("--write", action="store_true", help=f"add the table to {PAGE.name}")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        lines = measure(arguments, Path(folder))
    print("\n".join(lines))
    if arguments.write:
        before = PAGE.read_text(encoding="utf-8") if PAGE.exists() else "# Distillation on data\n"
        PAGE.write_text("\n".join([before, *lines, ""]), encoding="utf-8")
