"""What is to be merged, as data: adapters and their strengths. `merge.py` makes tensors of it, one layer at a time."""

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

from .adapter import Adapter
from .blocks import BlockScale
from .errors import SettingError
from .families import network_order
from .gate import Gate
from .schedule import Schedule


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """One adapter in a merge.

    Attributes:
        adapter: what is added.
        strength: its factor; the product of all alpha, beta and strengths on the way here.
        onto: re-express this adapter's layers on the basis of that one, where they differ.
        scales: further factors, by block, part and stream; all of them multiply.
        schedules: further factors over the sampling; all of them multiply. Only live application follows them.
        gate: on which prompts the term acts; None: on all. Only live application can tell prompts apart.
        own_pass: what tells the pass of the model in which the term acts from others, see `passes`; None: it acts in
            all of them. Only live application makes passes.
    """

    adapter: Adapter
    strength: float
    onto: Adapter | None = None
    scales: tuple[BlockScale, ...] = ()
    schedules: tuple[Schedule, ...] = ()
    gate: Gate | None = None
    own_pass: tuple[Hashable, ...] | None = None

    @property
    def needs_live(self) -> bool:
        """Whether its strength changes in a sampling, differs between prompts, or counts for predictions."""
        return bool(self.gate or self.schedules or self.own_pass)

    @property
    def identity(self) -> tuple[Hashable, ...]:
        """What two terms have in common that differ in nothing but their strength."""
        return (id(self.adapter), id(self.onto), self.scales, self.schedules, self.gate, self.own_pass)

    def block_factor(self, name: str) -> float:
        """What the scales make of one layer, without the strength."""
        return math.prod(scale.factor(name) for scale in self.scales)

    def factor(self, name: str) -> float:
        """The whole factor of one layer."""
        return self.strength * self.block_factor(name)

    def changes(self, name: str) -> bool:
        """Whether the term adds anything to a layer."""
        return name in self.adapter.layers and self.factor(name) != 0

    def __str__(self) -> str:
        notes = [*map(str, self.scales), *map(str, self.schedules)]
        if self.gate:
            notes.append(str(self.gate))
        if self.own_pass:
            notes.append("in a pass of its own")
        return f"{self.strength:g} x {self.adapter.name}" + "".join(f" [{note}]" for note in notes)


@dataclass(frozen=True, slots=True, eq=False)
class MergeRecipe:
    """Adapters and strengths; nothing is computed until a layer is asked for.

    Terms that differ in nothing but their strength are one term, so that merging a merge with itself, again and again,
    does not double the work each time.
    """

    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        joined: dict[object, Term] = {}
        for term in self.terms:
            earlier = joined.get(term.identity)
            joined[term.identity] = replace(earlier, strength=earlier.strength + term.strength) if earlier else term
        object.__setattr__(self, "terms", tuple(joined.values()))

    @classmethod
    def of(cls, adapter: Adapter, strength: float = 1.0) -> "MergeRecipe":
        """A recipe of one adapter."""
        return cls((Term(adapter, strength),))

    @property
    def active(self) -> tuple[Term, ...]:
        """The terms that change anything."""
        return tuple(term for term in self.terms if any(term.changes(name) for name in term.adapter.layers))

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """Every adapter once, in order, whatever its strength."""
        return tuple({id(term.adapter): term.adapter for term in self.terms}.values())

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Every layer of every adapter, in network order."""
        return tuple(sorted({name for term in self.terms for name in term.adapter.layers}, key=network_order))

    def require_terms(self) -> "MergeRecipe":
        """This recipe, for what needs at least one adapter.

        Raises:
            SettingError: there is none.
        """
        if not self.terms:
            raise SettingError("no adapter is connected here (or all are bypassed): connect Load \u0394R Adapter")
        return self

    def scaled(self, strength: float) -> "MergeRecipe":
        """The same recipe with every strength multiplied.

        Raises:
            SettingError: the factor, or what it makes of a strength, is not a finite number.
        """
        if not all(math.isfinite(strength * term.strength) for term in self.terms):
            raise SettingError(f"strength {strength:g} is no usable factor here; use a number from -4 to 4")
        return MergeRecipe(tuple(replace(term, strength=term.strength * strength) for term in self.terms))

    @property
    def needs_live(self) -> bool:
        """Whether any term can only be applied live."""
        return any(term.needs_live for term in self.terms)

    def scheduled(self, schedule: Schedule) -> "MergeRecipe":
        """The same recipe with one more factor over the sampling on every term; a constant one scales it."""
        if schedule.constant is not None:
            return self.scaled(schedule.constant)
        return MergeRecipe(tuple(replace(term, schedules=(*term.schedules, schedule)) for term in self.terms))

    def gated(self, gate_of: Callable[[Adapter], Gate | None]) -> "MergeRecipe":
        """The same recipe, whose terms act by the prompt; a gate that a term has already stays."""
        return MergeRecipe(tuple(replace(term, gate=term.gate or gate_of(term.adapter)) for term in self.terms))

    def in_own_pass(self) -> "MergeRecipe":
        """The same recipe, whose terms act together in a pass of their own; those that have one already keep it."""
        own_pass = tuple(term.identity for term in self.terms if term.own_pass is None)
        return MergeRecipe(tuple(replace(term, own_pass=term.own_pass or own_pass) for term in self.terms))

    def block_scaled(self, scale: BlockScale) -> "MergeRecipe":
        """The same recipe with one more factor per block, part and stream on every term.

        Raises:
            TargetError: a range of blocks matches none of the recipe's layers.
        """
        scale.check(self.layer_names)
        return MergeRecipe(tuple(replace(term, scales=(*term.scales, scale)) for term in self.terms))


NOTHING = MergeRecipe(())
