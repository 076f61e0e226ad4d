"""The merges that are measured, each with settings that mean the same in lfm and in mergekit."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Layout = Literal["llama", "many", "mixture"]


@dataclass(frozen=True)
class Case:
    """One merge: what lfm is asked to do, and what mergekit is."""

    name: str
    method: str
    sources: tuple[str, ...] = ("a", "b")
    base: bool = False  # whether lfm gets --base
    peer_base: str | None = None  # what mergekit calls the base: slerp and nearswap have one there
    ours: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {"": ()})  # options by label; first = same work
    peer: Mapping[str, float | bool] = field(default_factory=dict)
    random: bool = False  # masks cannot be shared, so that outputs agree in their statistics only
    layout: Layout = "llama"
    with_peer: bool = True
    peer_repeats: int | None = None  # fewer, where one run takes minutes

    @property
    def inputs(self) -> tuple[str, ...]:
        """The checkpoints that are read."""
        return self.sources + (("base",) if self.base else ())


def _on_base(
    name: str, ours: Mapping[str, tuple[str, ...]] | None = None, *, random: bool = False, **peer: float
) -> Case:
    """Return a merge of the changes of two fine-tunes into their base."""
    return Case(name, name, base=True, peer_base="base", ours=ours or {"": ()}, peer=peer, random=random)


def _plain(name: str, method: str, **peer: float) -> Case:
    """Return a merge of two models without a base."""
    return Case(name, method, peer=peer)


MERGEKIT = ("--rules", "mergekit")  # how it breaks ties between signs
DROP = ("--density", "0.5")
CRUMBS = ("--density", "0.9", "--outliers", "0.01", "--scale", "1")


def _same(*options: str) -> Mapping[str, tuple[str, ...]]:
    """Return options that do what mergekit does, under the only label."""
    return {"": options}


def _both(shared: tuple[str, ...], *as_mergekit: str) -> Mapping[str, tuple[str, ...]]:
    """Return options that do what mergekit does, and those that do what the paper says."""
    return {"as mergekit": shared + as_mergekit, "as the paper": shared}


CASES = {
    case.name: case
    for case in (
        _plain("linear2", "linear", weight=0.5),
        Case("slerp", "slerp", peer_base="a", ours=_same("--t", "0.5", "--straight-from", "0.9995"), peer={"t": 0.5}),
        _on_base("task_arithmetic", _same("--scale", "1"), weight=1, normalize=False),
        _on_base(
            "ties",
            _both(("--density", "0.2"), "--scope", "tensor", *MERGEKIT),
            weight=1,
            density=0.2,
            normalize=True,
        ),
        _on_base(
            "dare_ties",
            _both(DROP, "--rescale", "norm", *MERGEKIT),
            random=True,
            weight=1,
            density=0.5,
            normalize=True,
        ),
        _on_base("dare_linear", _both(DROP, "--rescale", "norm"), random=True, weight=1, density=0.5, normalize=False),
        _on_base("breadcrumbs", _same(*CRUMBS), weight=1, density=0.9, gamma=0.01, normalize=False),
        _on_base("breadcrumbs_ties", _same(*CRUMBS, *MERGEKIT), weight=1, density=0.9, gamma=0.01, normalize=True),
        _on_base(
            "della",
            _both((*DROP, "--epsilon", "0.15"), "--rescale", "norm", *MERGEKIT),
            random=True,
            weight=1,
            density=0.5,
            epsilon=0.15,
            normalize=True,
        ),
        _on_base("sce", _same("--select-topk", "0.5", *MERGEKIT), select_topk=0.5),
        _plain("karcher", "karcher"),
        _plain("nuslerp", "nuslerp", weight=0.5),
        _plain("multislerp", "multislerp", weight=0.5),
        _on_base("model_stock", _same("--extrapolate", "--least-product", "1e-6")),
        Case("nearswap", "nearswap", ("a",), True, "base", _same("--t", "0.001"), {"t": 0.001}),
        Case("arcee_fusion", "arcee_fusion", ("a",), True, "base", random=True),
        Case("passthrough", "passthrough", ("a",)),
        Case("tiny_tensors", "linear", peer={"weight": 0.5}, layout="many", peer_repeats=1),
        Case("experts_linear2", "linear", layout="mixture", with_peer=False),
        Case(
            "experts_ties",
            "ties",
            base=True,
            ours=_both(("--density", "0.2"), "--scope", "tensor"),
            layout="mixture",
            with_peer=False,
        ),
    )
}
BIG = (
    Case("linear2", "linear", ours={"memory 500MB": ("--memory", "500MB")}, with_peer=False),
    Case("ties", "ties", base=True, ours={"memory 500MB": ("--density", "0.2", "--memory", "500MB")}, with_peer=False),
)
