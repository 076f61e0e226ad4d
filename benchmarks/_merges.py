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


def _plain(name: str, ours: tuple[str, ...] = (), **peer: float) -> Case:
    """Return a merge of two models without a base."""
    return Case(name, name, ours={"": ours}, peer=peer)


CASES = {
    case.name: case
    for case in (
        Case("linear2", "linear", peer={"weight": 0.5}),
        Case("slerp", "slerp", peer_base="a", ours={"": ("--t", "0.5")}, peer={"t": 0.5}),
        _on_base("task_arithmetic", {"": ("--scale", "1")}, weight=1.0, normalize=False),
        _on_base(
            "ties",
            {"scope tensor": ("--density", "0.2", "--scope", "tensor"), "default scope": ("--density", "0.2")},
            weight=1.0,
            density=0.2,
            normalize=True,
        ),
        _on_base("dare_ties", {"": ("--density", "0.5")}, random=True, weight=1.0, density=0.5, normalize=True),
        _on_base("dare_linear", {"": ("--density", "0.5")}, random=True, weight=1.0, density=0.5, normalize=False),
        _on_base(
            "breadcrumbs",
            {"": ("--density", "0.9", "--outliers", "0.01", "--scale", "1")},
            weight=1.0,
            density=0.9,
            gamma=0.01,
            normalize=False,
        ),
        _on_base(
            "breadcrumbs_ties",
            {"": ("--density", "0.9", "--outliers", "0.01", "--scale", "1")},
            weight=1.0,
            density=0.9,
            gamma=0.01,
            normalize=True,
        ),
        _on_base(
            "della",
            {"": ("--density", "0.5", "--epsilon", "0.15")},
            random=True,
            weight=1.0,
            density=0.5,
            epsilon=0.15,
            normalize=True,
        ),
        _on_base("sce", {"": ("--density", "0.5")}, select_topk=0.5),
        _plain("karcher"),
        _plain("nuslerp", weight=0.5),
        _plain("multislerp", weight=0.5),
        _on_base("model_stock"),
        Case("nearswap", "nearswap", ("a",), True, "base", {"": ("--t", "0.001")}, {"t": 0.001}),
        Case("arcee_fusion", "arcee_fusion", ("a",), True, "base", random=True),
        Case("passthrough", "passthrough", ("a",)),
        Case("tiny_tensors", "linear", peer={"weight": 0.5}, layout="many", peer_repeats=1),
        Case("experts_linear2", "linear", layout="mixture", with_peer=False),
        Case(
            "experts_ties",
            "ties",
            base=True,
            ours={"scope tensor": ("--density", "0.2", "--scope", "tensor"), "default scope": ("--density", "0.2")},
            layout="mixture",
            with_peer=False,
        ),
    )
}
BIG = (
    Case("linear2", "linear", ours={"memory 500MB": ("--memory", "500MB")}, with_peer=False),
    Case("ties", "ties", base=True, ours={"memory 500MB": ("--density", "0.2", "--memory", "500MB")}, with_peer=False),
)
